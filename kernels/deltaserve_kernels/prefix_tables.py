"""Prefixes: K and V of positions that stand before a sequence's own, by slot.

They are copied into the first blocks of a sequence, where attention reads them like any others: no operator knows of
them. Prefixes of several adapters follow each other; one that was made of embeddings keeps these, since behind another
prefix, or under other terms, its K and V are others and have to be computed anew.
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
    ``num_tokens`` positions. One regime serves all, else each KV regime has its own. ``embeddings`` [num_tokens,
    hidden]: what a pass over the base made the pages of, None where K and V are given."""

    pages: Tensor
    num_tokens: int
    embeddings: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + (0 if self.embeddings is None else self.embeddings.nbytes)

    def to(self, device: torch.device) -> PrefixEntry:
        embeddings = None if self.embeddings is None else self.embeddings.to(device)
        return PrefixEntry(self.pages.to(device), self.num_tokens, embeddings)


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

    def embeddings(self, slot: int) -> Tensor | None:
        """[p, hidden] of a slot whose prefix is made of embeddings, else None."""
        entry = self._entries.get(slot)
        return None if entry is None else entry.embeddings

    def set(self, slot: int, entry: PrefixEntry) -> None:
        """Give a slot a prefix, replacing what was there. Raises ``OutOfRange`` or ``ShapeMismatch``."""
        if not 0 <= slot < self.num_slots:
            raise OutOfRange(f"slot {slot} is outside 0..{self.num_slots - 1}")
        wanted = -(-entry.num_tokens // BLOCK_SIZE)
        if entry.num_tokens < 1 or entry.pages.dim() < 3 or entry.pages.shape[1] != wanted:
            found = f"{entry.num_tokens} positions in pages {list(entry.pages.shape)}"
            raise ShapeMismatch(f"{found}; [regimes, {wanted}, ...] is needed, for at least one position")
        if entry.embeddings is not None and (entry.embeddings.dim() != 2 or len(entry.embeddings) != entry.num_tokens):
            raise ShapeMismatch(f"{entry.num_tokens} positions of embeddings {list(entry.embeddings.shape)}")
        self._entries[slot] = entry

    def clear(self, slot: int) -> None:
        """Empty a slot and let go of its pages."""
        self._entries.pop(slot, None)

    def copy(
        self, slot: int, pool: Tensor, blocks: Sequence[int], first: int = 0, regime: int = 0, start: int = 0
    ) -> None:
        """Write the prefix of ``slot`` to positions ``start`` on of a sequence; ``pool`` [blocks, *page], ``blocks`` is
        the sequence's block table. Blocks before its block ``first`` are left alone. Where the prefix begins with a
        block, what follows it in its last block is overwritten with zeros.

        Raises ``ShapeMismatch`` when pages or block table do not fit.
        """
        entry = self._entries[slot]
        pages = entry.pages[min(regime, len(entry.pages) - 1)]
        stop = start + entry.num_tokens
        if pages.shape[1:] != pool.shape[1:] or len(blocks) * BLOCK_SIZE < stop:
            found = f"pages {list(pages.shape)} from position {start} on and {len(blocks)} blocks"
            raise ShapeMismatch(f"{found}; the pool is {list(pool.shape)}")
        begin = max(start, first * BLOCK_SIZE)
        if begin >= stop:
            return
        if start % BLOCK_SIZE == 0:
            places = torch.tensor(blocks[begin // BLOCK_SIZE : -(-stop // BLOCK_SIZE)], dtype=torch.int64)
            pool.index_copy_(0, upload(places, pool.device), pages[(begin - start) // BLOCK_SIZE :])
            return
        at = [(blocks[i // BLOCK_SIZE], i % BLOCK_SIZE, *divmod(i - start, BLOCK_SIZE)) for i in range(begin, stop)]
        to_block, to_place, page, place = upload(torch.tensor(at, dtype=torch.int64).t().contiguous(), pool.device)
        # Positions are the last dimension but one of a page: [blocks, 16, *rest] for both.
        pool.movedim(-2, 1)[to_block, to_place] = pages.movedim(-2, 1)[page, place]
