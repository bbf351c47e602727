"""The paged KV pool: one tensor, a page of which holds one block of positions for all layers.

A block is 16 positions. Operators take per-layer K and V as strided views ``[num_blocks, kv_heads, 16, head_dim]`` of
the pool, so a block can be copied, shared or freed in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one position needs: ``num_layers`` times K and V of ``[kv_heads, head_dim]`` in ``dtype``."""

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block (16 positions, K and V, all layers)."""
        return self.num_layers * 2 * self.kv_heads * BLOCK_SIZE * self.head_dim * self.dtype.itemsize


class KVCache:
    """``num_blocks`` blocks of the layout on ``device``; who owns which block is the block manager's business.

    ``has_scratch`` adds one block that nobody owns, ``scratch_block``: rows that only fill up a step write there.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, device: torch.device | str, *, has_scratch: bool = False
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; at least 1 is needed")
        self.layout = layout
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks if has_scratch else None
        shape = (num_blocks + has_scratch, layout.num_layers, 2, layout.kv_heads, BLOCK_SIZE, layout.head_dim)
        # Zeros, not empty: a masked position may hold any finite value, but NaN times zero weight would still be NaN.
        self.pool = torch.zeros(shape, dtype=layout.dtype, device=device)
        self._k = tuple(self.pool[:, layer, 0] for layer in range(layout.num_layers))
        self._v = tuple(self.pool[:, layer, 1] for layer in range(layout.num_layers))

    def k(self, layer: int) -> Tensor:
        """Keys of a layer: ``[num_blocks, kv_heads, 16, head_dim]``, a strided view."""
        return self._k[layer]

    def v(self, layer: int) -> Tensor:
        """Values of a layer: ``[num_blocks, kv_heads, 16, head_dim]``, a strided view."""
        return self._v[layer]
