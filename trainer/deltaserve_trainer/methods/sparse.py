"""Sparse fine-tuning: choose exactly k weights of the base, then train a difference for those and nothing else.

The base weights are never written. A targeted linear computes with ``W + S``, put together for the moment of the
product; of the gradient of ``W`` (one linear at a time) only the k entries are kept. So the memory beyond the base is
one linear plus a few numbers per entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaserve_store.formats.deltaserve_sparse import write_sparse_adapter
from deltaserve_store.parsed import ParsedAdapter, SparseDelta
from deltaserve_trainer.base import Base, is_transposed, target_linears, weight_of
from deltaserve_trainer.errors import RecipeInvalid
from deltaserve_trainer.methods import LossOfBatch
from deltaserve_trainer.methods.selection import select_by_gradient, select_by_magnitude
from deltaserve_trainer.recipe import Recipe


class SparseLinear(nn.Module):
    """A frozen linear with a trained difference at ``index``.

    ``index`` is int64 ``[k]``, sorted positions in the flattened ``[out, in]`` weight; ``values`` float32 ``[k]``.
    """

    index: Tensor

    def __init__(self, linear: nn.Module, index: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("index", index, persistent=False)
        self.values = nn.Parameter(torch.zeros(len(index), device=index.device))
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_enabled:
            output: Tensor = self.linear(x)
            return output
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _SparseProduct.apply(x, self.values, self)
        bias = getattr(self.linear, "bias", None)
        return y if bias is None else y + bias.to(y.dtype)

    def effective_weight(self) -> Tensor:
        """``W + S`` as ``[out, in]``, a new tensor in the base's dtype."""
        weight = weight_of(self.linear).detach()
        dense = (weight.T if is_transposed(self.linear) else weight).clone(memory_format=torch.contiguous_format)
        dense.view(-1).index_add_(0, self.index, self.values.detach().to(dense.dtype))
        return dense


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, module: SparseLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        return F.linear(x, module.effective_weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        (grad_y,) = grads
        module: SparseLinear = ctx.module
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ module.effective_weight().to(grad_y.dtype)
        if ctx.needs_input_grad[1]:
            dense = grad_y.flatten(0, -2).T @ x.flatten(0, -2)
            grad_values = dense.reshape(-1)[module.index].to(module.values.dtype)
        return grad_x, grad_values, None


class SparseMethod:
    """A base whose chosen linears are ``SparseLinear``; linears without a chosen entry stay as they are."""

    def __init__(self, model: nn.Module, indices: Mapping[str, Tensor]) -> None:
        self.model = model
        self._linears: dict[str, SparseLinear] = {}
        for name, index in indices.items():
            linear = model.get_submodule(name)
            device = weight_of(linear).device
            self._linears[name] = SparseLinear(linear, index.to(device, torch.int64))
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, self._linears[name])

    @classmethod
    def select(
        cls, model: nn.Module, recipe: Recipe, loss_of_batch: LossOfBatch, on_step: Callable[[int, int], None]
    ) -> SparseMethod:
        """Choose the entries as the recipe says; the base is unchanged afterwards."""
        options = recipe.sparse
        if options is None:
            raise RecipeInvalid("sparse options are missing", param="sparse")
        targets = {name: weight_of(linear) for name, linear in target_linears(model, options.target_modules).items()}
        available = sum(weight.numel() for weight in targets.values())
        k = options.num_entries if options.num_entries is not None else round((options.density or 0) * available)
        if not 1 <= k <= available:
            raise RecipeInvalid(
                f"{k} entries asked for; allowed: 1 to {available} in the targeted linears", param="sparse"
            )
        if options.selection == "gradient":
            stored = select_by_gradient(targets, k, loss_of_batch, options.selection_steps, on_step)
        else:
            stored = select_by_magnitude(
                targets, k, loss_of_batch, options.selection_steps, recipe.learning_rate, recipe.max_grad_norm, on_step
            )
        return cls(model, {name: _as_out_in(model.get_submodule(name), index) for name, index in stored.items()})

    @classmethod
    def restore(cls, model: nn.Module, structure: Mapping[str, Tensor]) -> SparseMethod:
        return cls(model, {name.removeprefix("index."): index for name, index in structure.items()})

    @classmethod
    def load(cls, model: nn.Module, parsed: ParsedAdapter) -> SparseMethod:
        """Attach a finished sparse adapter of any file format the store reads."""
        deltas = [delta for delta in parsed.deltas if isinstance(delta, SparseDelta)]
        indices = {}
        for delta in deltas:
            linear = model.get_submodule(delta.module)
            in_features = weight_of(linear).shape[0 if is_transposed(linear) else 1]
            indices[delta.module] = delta.rows.long() * in_features + delta.cols.long()
        method = cls(model, indices)
        for delta in deltas:
            method._linears[delta.module].values.data.copy_(delta.values.float())
        return method

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"values.{name}": linear.values for name, linear in self._linears.items()}

    def structure(self) -> dict[str, Tensor]:
        return {f"index.{name}": linear.index for name, linear in self._linears.items()}

    def num_entries(self) -> int:
        return sum(len(linear.index) for linear in self._linears.values())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        for linear in self._linears.values():
            linear.is_enabled = False
        try:
            yield
        finally:
            for linear in self._linears.values():
                linear.is_enabled = True

    def save(self, folder: Path, base: Base, save_dtype: str) -> None:
        """The project's sparse format; every chosen entry is written, also where its value stayed zero."""
        folder.mkdir(parents=True, exist_ok=True)
        dtype = getattr(torch, save_dtype)
        deltas = []
        for name, linear in self._linears.items():
            weight = weight_of(linear.linear)
            in_features = weight.shape[0 if is_transposed(linear.linear) else 1]
            index = linear.index.cpu()
            rows, cols = (index // in_features).int(), (index % in_features).int()
            deltas.append(SparseDelta(name, rows, cols, linear.values.detach().to("cpu", dtype)))
        write_sparse_adapter(folder, deltas, base.fingerprint, base_name=base.name, method="fixed mask")


def _as_out_in(linear: nn.Module, stored: Tensor) -> Tensor:
    """Flat positions of the stored weight as sorted flat positions of ``[out, in]``."""
    if not is_transposed(linear):
        return stored
    in_features, out_features = weight_of(linear).shape
    position = (stored % out_features) * in_features + stored // out_features
    return position.sort().values
