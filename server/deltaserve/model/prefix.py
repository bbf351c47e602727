"""Folded mode with a prefix: the K and V that virtual tokens leave, and the logits of tokens behind a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.model.context import FoldedContext

if TYPE_CHECKING:
    from deltaserve.model.base import BaseModel


@torch.inference_mode()
def prompt_kv(base: BaseModel, embeddings: Tensor, regime: int) -> Tensor:
    """What attention caches of virtual tokens alone, fp32 [num_layers, 2, kv_heads, p, head_dim].

    ``embeddings`` fp32 [p, hidden], as the decoder takes them in place of those of tokens.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    positions = torch.arange(len(embeddings), device=base.device)
    ctx = FoldedContext(deltas={}, seen=seen, kv_regimes=torch.full_like(positions, regime) if regime else None)
    base.decode_embeddings(embeddings, positions[:0], positions, ctx)
    return torch.stack([torch.stack(seen[layer]) for layer in range(base.kv_layout.num_layers)])


@torch.inference_mode()
def prefixed_logits(
    base: BaseModel,
    ids: Tensor,
    *,
    embeddings: Tensor | None = None,
    keys_values: Sequence[tuple[Tensor, Tensor]] = (),
    precision: torch.dtype | None = None,
) -> Tensor:
    """The proof's half for a prefix: ``ids`` int64 [T] behind p virtual tokens -> float32 [T, vocab], all in fp32.

    The virtual tokens are ``embeddings`` [p, hidden], run together with the tokens, or ``keys_values``, K and V
    [kv_heads, p, head_dim] of each layer, put before the tokens' own. ``precision``: as in ``FoldedContext``.
    """
    ids = ids.to(base.device)
    before = torch.zeros(0, base.hidden_size) if embeddings is None else embeddings
    skipped = len(before) if embeddings is not None else keys_values[0][0].shape[1]
    positions = torch.arange(skipped - len(before), skipped + len(ids), device=base.device)
    regime = base.kv_regime(skipped + len(ids))
    regimes = torch.full_like(positions, regime) if regime else None
    ctx = FoldedContext(deltas={}, past=keys_values, kv_regimes=regimes, precision=precision)
    hidden = base.decode_embeddings(before, ids, positions, ctx)
    return base.logits(hidden[len(before) :], ctx)
