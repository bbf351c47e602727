"""At load, compare the base as we run it with the unmodified transformers model on a short probe.

Two sequences are computed alone by transformers, and together, in chunks, through block tables by us. Whatever mixes
rows, reads positions its own way or computes something the trace did not see shows up as a difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaserve.errors import UnsupportedBase
from deltaserve.model.context import ForwardContext
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache

if TYPE_CHECKING:
    from deltaserve.model.base import BaseModel

# Largest relative distance (L2) of logits: rounding alone, in another order of operations.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_LENGTHS = (21, 7)
_BLOCKS = ((3, 1), (4,))
# Per step, the range of positions of each sequence.
_STEPS = (((0, 13), (0, 0)), ((13, 20), (0, 6)), ((20, 21), (6, 7)))


def probe_sequences(vocab_size: int, max_context: int, device: torch.device) -> list[Tensor]:
    """Two deterministic random sequences of ids, int64 [T] each."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, vocab_size, (min(length, max_context),), generator=generator).to(device) for length in _LENGTHS
    ]


@torch.no_grad()
def reference_logits(model: PreTrainedModel, sequences: list[Tensor]) -> list[Tensor]:
    """Float32 [T, vocab] of each sequence alone from the unmodified model."""
    try:
        return [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in sequences]
    except Exception as error:
        raise UnsupportedBase(f"transformers itself cannot run {model.config.model_type}: {error}") from error


def verify(base: BaseModel, sequences: list[Tensor], references: list[Tensor]) -> None:
    """Raise UnsupportedBase when the paged forward differs from the references beyond rounding."""
    kv = KVCache(base.kv_layout, 5, base.device)
    rows: list[list[Tensor]] = [[] for _ in sequences]
    for step in _STEPS:
        ranges = [(i, start, min(stop, len(sequences[i]))) for i, (start, stop) in enumerate(step)]
        ranges = [(i, start, stop) for i, start, stop in ranges if stop > start]
        if not ranges:
            continue
        ctx, ids = _context(kv, sequences, ranges, base.device)
        with torch.inference_mode():
            logits = base.logits(base.forward(ids, ctx), ctx)
        pieces = logits.split([stop - start for _, start, stop in ranges])
        for (i, _, _), piece in zip(ranges, pieces, strict=True):
            rows[i].append(piece)
    found, wanted = torch.cat([row for pieces in rows for row in pieces]), torch.cat(references)
    if not torch.isfinite(wanted).all():
        raise UnsupportedBase(f"the base's logits are not finite in {base.dtype}; choose another dtype")
    distance = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    allowed = TOLERANCES[base.dtype]
    if not distance <= allowed:
        raise UnsupportedBase(
            f"{base.spec.model_type} computed through paged attention differs from transformers by {distance:.2e} "
            f"(relative; allowed {allowed:.0e}), so this architecture does something that is not served"
        )


def _context(
    kv: KVCache, sequences: list[Tensor], ranges: list[tuple[int, int, int]], device: torch.device
) -> tuple[ForwardContext, Tensor]:
    positions = torch.cat([torch.arange(start, stop) for _, start, stop in ranges])
    sizes = torch.tensor([stop - start for _, start, stop in ranges])
    tables = torch.tensor([(_BLOCKS[i] + (0,))[:2] for i, _, _ in ranges])
    block = tables.repeat_interleave(sizes, dim=0)[torch.arange(len(positions)), positions // BLOCK_SIZE]
    ctx = ForwardContext(
        positions=positions.to(device),
        cu_seqlens_q=torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).int().to(device),
        kv_lens=torch.tensor([stop for _, _, stop in ranges], dtype=torch.int32, device=device),
        block_tables=tables.int().to(device),
        kv_index=(block * BLOCK_SIZE + positions % BLOCK_SIZE).to(device),
        kv=kv,
    )
    return ctx, torch.cat([sequences[i][start:stop] for i, start, stop in ranges])
