"""The embedding whose rows adapters may change, found by what it does and not by its name.

Rows of a step whose token has another embedding are looked up anew, by the module's own code, in a matrix of just these
rows: so whatever the module does beside looking up (Gemma scales) is done to them too, in its dtype. That this equals
the module is tried at load. Rows without a change never see it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.model.context import FoldedContext, ForwardContext, current_or_none, use
from deltaserve.model.folded import copy_with
from deltaserve_kernels import change_embeddings, stored_rows
from deltaserve_store.spec import LinearSpec

logger = logging.getLogger(__name__)

_PROBE_ROWS = 5
_TOLERANCE = 1e-6  # relative, fp32


class TunableEmbedding:
    """``weight`` [vocab, width] as stored, and the forward of the module around the ``run`` it had."""

    def __init__(self, name: str, module: nn.Module, weight: Tensor, run: Callable[..., Any]) -> None:
        self.name = name
        self.module = module
        self.weight = weight
        self.run = run

    @property
    def spec(self) -> LinearSpec:
        """A linear from token ids."""
        return LinearSpec(self.name, self.weight.shape[1], self.weight.shape[0])

    def look_up(self, rows: Tensor) -> Tensor:
        """What the module makes of these rows of its matrix, [n, width] -> [n, width], in their dtype; fp32 rows as in
        folded mode."""
        twin = copy_with(self.module, {"weight": rows})
        if rows.dtype != torch.float32:
            twin.__dict__["_parameters"] = {"weight": nn.Parameter(rows, requires_grad=False)}
            twin.__dict__["_buffers"] = self.module._buffers
        twin.__dict__["padding_idx"] = None
        found: Tensor = twin.forward(torch.arange(len(rows), device=rows.device))
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ctx = current_or_none()
        if isinstance(ctx, FoldedContext) and self.name in ctx.rows:
            return self._folded(ctx.rows[self.name], *args, **kwargs)
        if not isinstance(ctx, ForwardContext) or ctx.vocabulary is None or not ctx.vocabulary.changes_embedding:
            return self.run(*args, **kwargs)
        ids = kwargs["input"] if "input" in kwargs else args[0]
        # Tokens beyond the matrix are added ones: each has a row of its own below.
        known = ids.clamp(max=len(self.weight) - 1) if ctx.vocabulary.num_token_ids > len(self.weight) else ids
        y = self.run(**{**kwargs, "input": known}) if "input" in kwargs else self.run(known, *args[1:], **kwargs)
        flat = y.view(-1, y.shape[-1])
        change_embeddings(flat, ids.reshape(-1), self.weight, ctx.vocabulary, self.look_up)
        return y

    def _folded(self, change: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = stored_rows(self.weight, flat).float() + change(flat).to(self.weight.device)
        return self.look_up(rows).view(*ids.shape, -1)


@contextmanager
def count_calls(model: nn.Module) -> Iterator[list[None]]:
    """A list that grows with each call of the model's embedding."""
    calls: list[None] = []
    module: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def make_embedding_tunable(model: nn.Module, num_calls: int) -> TunableEmbedding | None:
    """Let steps and folded passes change rows of the model's embedding; None where its module does anything that a
    look-up of changed rows would not repeat. Call it last. ``num_calls``: how often a pass called the module.
    """
    module: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight = getattr(module, "weight", None)
    name = next((name for name, found in model.named_modules() if found is module), None)
    if not isinstance(module, nn.Embedding) or name is None or num_calls != 1 or not isinstance(weight, Tensor):
        logger.info("the embedding is none that adapters can change")
        return None
    embedding = TunableEmbedding(name, module, weight.data, module.forward)
    if module.max_norm is not None or not _is_look_up(embedding):
        logger.info("%s is no embedding that adapters can change", name)
        return None
    module.__dict__["forward"] = embedding
    return embedding


def _is_look_up(embedding: TunableEmbedding) -> bool:
    """Whether the module gives what it gives for the rows alone, on rows that it does not have as well."""
    count = len(embedding.weight)
    ids = torch.linspace(0, count - 1, _PROBE_ROWS, dtype=torch.float64).long().to(embedding.weight.device)
    try:
        with torch.inference_mode(), use(FoldedContext(deltas={})):
            wanted = embedding.run(ids).float()
            found = embedding.look_up(embedding.weight[ids].float())
            doubled = embedding.look_up(2 * embedding.weight[ids].float())
    except Exception as error:  # whatever this module is, it is not called in the way that was tried
        logger.debug("%s is left as it is: %s", type(embedding.module).__name__, error)
        return False
    same = found.shape == wanted.shape and bool((found - wanted).norm() <= _TOLERANCE * wanted.norm())
    return same and bool((doubled - 2 * wanted).norm() <= _TOLERANCE * wanted.norm())
