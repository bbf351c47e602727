"""What a training method must offer the loop. LoRA goes through peft, sparse fine-tuning is our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from deltaserve_trainer.base import Base
from deltaserve_trainer.recipe import Recipe

LossOfBatch = Callable[[int], Tensor]
"""Mean loss of training batch i, with a graph to every parameter that requires a gradient."""


class Method(Protocol):
    """An adapter under training. ``model`` is called by the loop with ``input_ids``."""

    model: nn.Module

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser changes, float32, by a name that is stable across runs."""

    def structure(self) -> dict[str, Tensor]:
        """Tensors that were decided once and must survive a resume, such as the sparse mask."""

    def disabled(self) -> AbstractContextManager[object]:
        """Inside, ``model`` is the base alone."""

    def save(self, folder: Path, base: Base, save_dtype: str) -> None:
        """Write the adapter files, and nothing else, into ``folder``."""

    def num_entries(self) -> int:
        """Numbers in the adapter file that training changed."""


def build_method(
    model: nn.Module,
    recipe: Recipe,
    *,
    loss_of_batch: Callable[[nn.Module, int], Tensor],
    structure: Mapping[str, Tensor] | None,
    on_selection_step: Callable[[int, int], None],
) -> Method:
    """Attach the recipe's method to ``model``. ``structure`` is that of an earlier part of the run, else None."""
    if recipe.method == "lora":
        from deltaserve_trainer.methods.lora import LoraMethod

        return LoraMethod.attach(model, recipe)
    from deltaserve_trainer.methods.sparse import SparseMethod

    if structure is not None:
        return SparseMethod.restore(model, structure)
    return SparseMethod.select(model, recipe, lambda i: loss_of_batch(model, i), on_selection_step)


def load_method(model: nn.Module, folder: Path, base: Base) -> Method:
    """Attach a finished adapter from its files, after the store's strict check: a PEFT LoRA or sparse entries.

    Raises ``AdapterInvalid``, also for kinds that only the server applies.
    """
    from deltaserve_store.findings import refuse
    from deltaserve_store.formats import read_adapter
    from deltaserve_trainer.base import spec_of

    parsed = read_adapter(folder, spec_of(model, base))
    if parsed.file_format == "peft-lora":
        from deltaserve_trainer.methods.lora import LoraMethod

        return LoraMethod.load(model, folder)
    if parsed.kind != "sparse":
        raise refuse("unsupported_kind", "adapter", parsed.file_format, "here a PEFT LoRA or a sparse adapter")
    from deltaserve_trainer.methods.sparse import SparseMethod

    return SparseMethod.load(model, parsed)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
