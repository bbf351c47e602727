"""Attention of every layer, plugged into transformers' ``AttentionInterface``.

transformers' attention modules project, normalise and rotate; then they call the function registered here, which writes
K and V to the paged cache and attends through block tables. What a layer needs (scale, window, soft cap) was recorded
when the base was traced at load, not guessed from its configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from deltaserve.model.context import FoldedContext, ForwardContext, current
from deltaserve_kernels import paged_attention, write_kv

# No mask function is registered under this name, so transformers builds no masks at all.
ATTENTION_NAME = "deltaserve"


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention. ``window``: a query sees that many positions, its own included; None: all before it.

    ``softcap``: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
    """

    layer: int
    scale: float
    window: int | None
    softcap: float | None


def attach_spec(module: nn.Module, spec: AttentionSpec) -> None:
    """Tell an attention module how it attends; read by ``attend``."""
    module.__dict__["deltaserve_attention"] = spec


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """``query`` [1, H, T, D], ``key`` and ``value`` [1, kv, T, D] -> [1, T, H, D], as transformers expects it."""
    spec: AttentionSpec = module.__dict__["deltaserve_attention"]
    ctx = current()
    if not isinstance(ctx, ForwardContext):
        if isinstance(ctx, FoldedContext):
            key, value = _after_past(key, value, spec.layer, ctx)
        return dense_attention(query, key, value, spec), None
    k_cache, v_cache = ctx.kv.k(spec.layer), ctx.kv.v(spec.layer)
    write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), k_cache, v_cache, ctx.kv_index)
    output = attend_paged(query[0].transpose(0, 1), spec, ctx)
    return output.unsqueeze(0), None


def _after_past(key: Tensor, value: Tensor, layer: int, ctx: FoldedContext) -> tuple[Tensor, Tensor]:
    """K and V [1, kv, T, D] behind those of the positions before, [1, kv, p + T, D]."""
    if ctx.seen is not None:
        ctx.seen[layer] = key[0], value[0]
    if not ctx.past:
        return key, value
    past_key, past_value = (part.to(key)[None] for part in ctx.past[layer])
    return torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)


def attend_paged(query: Tensor, spec: AttentionSpec, ctx: ForwardContext) -> Tensor:
    """A step's queries [T, H, D] over the cache, which holds this step's keys and values already -> [T, H, D]."""
    return paged_attention(
        query,
        ctx.kv.k(spec.layer),
        ctx.kv.v(spec.layer),
        ctx.block_tables,
        ctx.cu_seqlens_q,
        ctx.kv_lens,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        one_query=ctx.is_decode,
    )


def dense_attention(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention over one whole sequence in fp32: the oracle used by folded mode and by the trace at load.

    ``query`` [1, H, T, D], ``key``, ``value`` [1, kv, p + T, D] -> [1, T, H, D] in the query's dtype; the queries are
    the last T positions.
    """
    num_groups = query.shape[1] // key.shape[1]
    k = key.float().repeat_interleave(num_groups, dim=1)
    v = value.float().repeat_interleave(num_groups, dim=1)
    scores = torch.matmul(query.float(), k.transpose(-1, -2)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    position = torch.arange(key.shape[2], device=query.device)
    distance = position[key.shape[2] - query.shape[2] :, None] - position[None, :]
    hidden = distance < 0 if spec.window is None else (distance < 0) | (distance >= spec.window)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.matmul(weights, v).transpose(1, 2).to(query.dtype).contiguous()


AttentionInterface.register(ATTENTION_NAME, attend)
