"""The inputs of decode steps at addresses that never change, which is what a captured graph reads.

A step of R rows is laid out as one of ``num_rows`` >= R. The rows that fill it up belong to nobody: token 0 at position
0, no adapter, K and V written to the cache's scratch block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaserve.engine.batch import ScheduledSequence
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache
from deltaserve_kernels import PaddedLayout, WorkList, upload

# The parts of one row: (slot, scale at the first layer, scale at the last one), as in a work list.
RowBinding = tuple[tuple[int, float, float], ...]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A static step of T rows as the model takes it; all on the device, at fixed addresses.

    ``ids``, ``positions``, ``kv_index``: int64 [T]; ``regimes`` int64 [T] for bases with KV regimes; ``cu_seqlens``
    int32 [T+1]; ``kv_lens`` int32 [T]; ``block_tables`` int32 [T, max_blocks]; ``work`` a padded list.
    """

    ids: Tensor
    positions: Tensor
    kv_index: Tensor
    regimes: Tensor | None
    cu_seqlens: Tensor
    kv_lens: Tensor
    block_tables: Tensor
    work: WorkList


class StaticStep:
    """Room for steps of at most ``max_seqs`` sequences whose block tables hold at most ``max_blocks`` blocks.

    ``fill`` costs one copy of 28 bytes a row, and of 24 more (a list's 6 int32) when adapters are in the step; block
    tables are copied only where a sequence got a block or rows moved. Raises ValueError for a cache without scratch.
    """

    def __init__(self, kv: KVCache, *, max_seqs: int, max_blocks: int, has_regimes: bool = False) -> None:
        if kv.scratch_block is None:
            raise ValueError("static steps need a KV cache with a scratch block")
        self.max_seqs = max_seqs
        self.max_blocks = max_blocks
        self._scratch_block: int = kv.scratch_block
        self._num_wide = 4 if has_regimes else 3
        device = kv.pool.device
        self._is_cuda = device.type == "cuda"
        self._inbox = torch.zeros(self._num_words(max_seqs, has_adapters=True), dtype=torch.int64, device=device)
        self._block_tables = torch.zeros(max_seqs, max_blocks, dtype=torch.int32, device=device)
        self._bounds = torch.arange(max_seqs + 1, dtype=torch.int32, device=device)
        # What the device's tables hold, row by row, and the list last packed with what it was packed from.
        self._held: list[list[int]] = [[] for _ in range(max_seqs)]
        self._packed: tuple[int, list[RowBinding], Any] = (0, [], None)

    def inputs(self, num_rows: int) -> StepInputs:
        """Views of a step of ``num_rows`` rows; take them anew for each pass (see ``PaddedLayout.work_list``)."""
        wide, kv_lens, listed = self._split(self._inbox, self._inbox.view(torch.int32), num_rows)
        return StepInputs(
            ids=wide[0],
            positions=wide[1],
            kv_index=wide[2],
            regimes=wide[3] if self._num_wide == 4 else None,
            cu_seqlens=self._bounds[: num_rows + 1],
            kv_lens=kv_lens,
            block_tables=self._block_tables[:num_rows],
            work=PaddedLayout(num_rows).work_list(listed),
        )

    def fits(self, batch: Sequence[ScheduledSequence]) -> bool:
        """Whether rows and block tables of the batch have room."""
        return len(batch) <= self.max_seqs and all(len(seq.block_table) <= self.max_blocks for seq in batch)

    def fill(
        self,
        batch: Sequence[ScheduledSequence],
        num_rows: int,
        bindings: list[RowBinding] | None = None,
        regimes: Sequence[int] | None = None,
    ) -> None:
        """Bring a decode step (one token a sequence) of ``num_rows`` >= len(batch) rows to the device; no sync.

        ``bindings``, one a row, None where no graph will read the list.
        """
        count = len(batch)
        host = torch.empty(
            self._num_words(num_rows, has_adapters=bindings is not None), dtype=torch.int64, pin_memory=self._is_cuda
        )
        staging = host.numpy()
        wide, kv_lens, listed = self._split(staging, staging.view(np.int32), num_rows)
        starts = [seq.start for seq in batch]
        wide[0, :count] = [seq.token_ids[0] for seq in batch]
        wide[1, :count] = starts
        wide[2, :count] = [
            seq.block_table[start // BLOCK_SIZE] * BLOCK_SIZE + start % BLOCK_SIZE
            for seq, start in zip(batch, starts, strict=True)
        ]
        kv_lens[:count] = starts
        kv_lens[:count] += 1
        wide[:, count:] = 0
        wide[2, count:] = self._scratch_block * BLOCK_SIZE + np.arange(num_rows - count) % BLOCK_SIZE
        kv_lens[count:] = 1
        if self._num_wide == 4:
            wide[3, :count] = regimes if regimes is not None else 0
        if bindings is not None:
            listed[:] = self._pack(bindings, num_rows)
        self._inbox[: len(host)].copy_(host, non_blocking=True)
        self._fill_block_tables([seq.block_table for seq in batch] + [[self._scratch_block]] * (num_rows - count))

    def _pack(self, bindings: list[RowBinding], num_rows: int) -> Any:
        """The list as int32; kept while the same bindings stay in the same rows."""
        if self._packed[0] != num_rows or self._packed[1] != bindings:
            layout = PaddedLayout(num_rows)
            packed = np.empty(layout.size, dtype=np.int32)
            layout.fill(packed, bindings)
            self._packed = (num_rows, bindings, packed)
        return self._packed[2]

    def _fill_block_tables(self, tables: Sequence[Sequence[int]]) -> None:
        """One copy of the rows from the first to the last that changed, as wide as the widest of them."""
        changed = [row for row, table in enumerate(tables) if self._held[row] != table]
        if not changed:
            return
        first, last = changed[0], changed[-1] + 1
        width = max(len(table) for table in tables[first:last])
        host = np.zeros((last - first, width), dtype=np.int32)
        for row in range(first, last):
            held = self._held[row] = list(tables[row])
            host[row - first, : len(held)] = held
        self._block_tables[first:last, :width].copy_(upload(torch.from_numpy(host), self._block_tables.device))

    def _num_words(self, num_rows: int, *, has_adapters: bool) -> int:
        """int64 of a step: ids, positions, kv_index (regimes), then lengths and the list, two int32 to a place."""
        num_narrow = num_rows + (PaddedLayout(num_rows).size if has_adapters else 0)
        return self._num_wide * num_rows + (num_narrow + 1) // 2

    def _split(self, wide: Any, narrow: Any, num_rows: int) -> tuple[Any, Any, Any]:
        """(int64 [3 or 4, T], kv_lens int32 [T], the list int32) of a buffer seen as int64 and as int32."""
        num_wide = self._num_wide * num_rows
        begin = 2 * num_wide + num_rows
        listed = narrow[begin : begin + PaddedLayout(num_rows).size]
        return wide[:num_wide].reshape(self._num_wide, num_rows), narrow[2 * num_wide : begin], listed
