"""Prefixes: K and V of positions that stand before a sequence's own, by slot.

They are copied into the first blocks of a sequence, where attention reads them like any others: no operator knows of
them, and the rows of such a sequence are rows of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.checks import BLOCK_SIZE
from deltaserve_kernels.errors import OutOfRange, ShapeMismatch
from deltaserve_kernels.transfer import upload


class PrefixEntry(NamedTuple):
    """``pages`` [regimes, blocks, *page]: whole blocks as the KV pool holds them, zeros after the last of the
    ``num_tokens`` positions. One regime serves all, else each KV regime has its own."""

    pages: Tensor
    num_tokens: int

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes

    def to(self, device: torch.device) -> PrefixEntry:
        return PrefixEntry(self.pages.to(device), self.num_tokens)


class PrefixTables:
    """For the engine thread, as all tables."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._entries: dict[int, PrefixEntry] = {}

    @property
    def is_empty(self) -> bool:
        return not self._entries

    def has_slot(self, slot: int) -> bool:
        return slot in self._entries

    def num_tokens(self, slot: int) -> int:
        """Positions that the prefix of a slot takes; 0 without one."""
        entry = self._entries.get(slot)
        return 0 if entry is None else entry.num_tokens

    def set(self, slot: int, entry: PrefixEntry) -> None:
        """Give a slot a prefix, replacing what was there. Raises ``OutOfRange`` or ``ShapeMismatch``."""
        if not 0 <= slot < self.num_slots:
            raise OutOfRange(f"slot {slot} is outside 0..{self.num_slots - 1}")
        wanted = -(-entry.num_tokens // BLOCK_SIZE)
        if entry.num_tokens < 1 or entry.pages.dim() < 3 or entry.pages.shape[1] != wanted:
            found = f"{entry.num_tokens} positions in pages {list(entry.pages.shape)}"
            raise ShapeMismatch(f"{found}; [regimes, {wanted}, ...] is needed, for at least one position")
        self._entries[slot] = entry

    def clear(self, slot: int) -> None:
        """Empty a slot and let go of its pages."""
        self._entries.pop(slot, None)

    def copy(self, slot: int, pool: Tensor, blocks: Sequence[int], first: int = 0, regime: int = 0) -> None:
        """Write the prefix of ``slot`` from its block ``first`` on into ``pool`` [blocks, *page]; ``blocks`` is the
        sequence's block table. What follows the prefix in its last block is overwritten with zeros.

        Raises ``ShapeMismatch`` when pages or block table do not fit.
        """
        entry = self._entries[slot]
        pages = entry.pages[min(regime, len(entry.pages) - 1)]
        if pages.shape[1:] != pool.shape[1:] or len(blocks) < len(pages):
            found = f"pages {list(pages.shape)} and {len(blocks)} blocks"
            raise ShapeMismatch(f"{found}; the pool is {list(pool.shape)}")
        places = torch.tensor(blocks[first : len(pages)], dtype=torch.int64)
        pool.index_copy_(0, upload(places, pool.device), pages[first:])
