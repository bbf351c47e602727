"""Turns the sequences of one step into tensors, runs the base over all of them at once, returns logits.

Everything the device needs for a step (ids, positions, block tables, row ranges) travels in one copy; the work list of
adapters is kept while the same bindings stay in the same rows, as they do from one decode step to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaserve.engine.batch import ScheduledSequence
from deltaserve.model.base import BaseModel
from deltaserve.model.context import ForwardContext
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache
from deltaserve_kernels import LoraTables, SparseTables, WorkList, build_work_list_runs

# (first row, number of rows, active parts as (slot, scale_first, scale_last))
Run = tuple[int, int, tuple[tuple[int, float, float], ...]]


class ModelRunner:
    """Runs steps; owned by the engine thread. The tables may change between steps, never during one."""

    def __init__(
        self, base: BaseModel, kv: KVCache, lora: LoraTables | None = None, sparse: SparseTables | None = None
    ) -> None:
        self.base = base
        self.kv = kv
        self.lora = lora
        self.sparse = sparse
        self._is_host = base.device.type == "cpu"
        self._staging = np.empty(0, dtype=np.int64)
        self._runs: list[Run] = []
        self._num_rows = -1
        self._work: WorkList | None = None

    @torch.inference_mode()
    def execute(self, batch: Sequence[ScheduledSequence]) -> Tensor:
        """Float32 [R, vocab] on the base's device: in batch order, 0 ("none"), 1 ("last") or all rows a sequence.

        Raises ValueError when a sequence is empty, exceeds the context or its block table.
        """
        ctx, input_ids, logit_rows = self._prepare(batch)
        hidden = self.base.forward(input_ids, ctx)
        if logit_rows is None:
            return self.base.logits(hidden, ctx)
        if not len(logit_rows):
            return torch.empty(0, self.base.vocab_size, device=self.base.device)
        return self.base.logits(hidden.index_select(0, logit_rows), ctx)

    def warm_up(self) -> None:
        """Run a prefill and a decode step once, so that the first request does not pay for first calls.

        Writes into blocks 0 and 1 of the cache: call it before anything is in there.
        """
        table = (0, 1)[: self.kv.num_blocks]
        length = min(len(table) * BLOCK_SIZE, self.base.max_context)
        first = ScheduledSequence(0, (0,) * max(length - 1, 1), 0, table)
        self.execute([first])
        if length > 1:
            self.execute([ScheduledSequence(0, (0,), length - 1, table, logits="all")])
        self.kv.pool.zero_()

    def _prepare(self, batch: Sequence[ScheduledSequence]) -> tuple[ForwardContext, Tensor, Tensor | None]:
        """Context, input ids int64 [T] and the rows that need logits (None: every row)."""
        num_sequences = len(batch)
        sizes = np.fromiter((len(seq.token_ids) for seq in batch), dtype=np.int64, count=num_sequences)
        starts = np.fromiter((seq.start for seq in batch), dtype=np.int64, count=num_sequences)
        self._check(batch, sizes, starts)
        stops = starts + sizes
        bounds = np.zeros(num_sequences + 1, dtype=np.int64)
        np.cumsum(sizes, out=bounds[1:])
        num_rows = int(bounds[-1])
        width = int(-(-stops.max() // BLOCK_SIZE))

        # int64: ids, positions, kv_index [T each]; then int32, two to a place: bounds, stops, tables, logit rows.
        num_narrow = (num_sequences + 1) + num_sequences + num_sequences * width + num_rows
        staging = self._reserve(3 * num_rows + (num_narrow + 1) // 2)
        ids, positions, kv_index = staging[: 3 * num_rows].reshape(3, num_rows)
        narrow = staging[3 * num_rows :].view(np.int32)
        tables = narrow[2 * num_sequences + 1 :][: num_sequences * width].reshape(num_sequences, width)
        narrow[: num_sequences + 1] = bounds
        narrow[num_sequences + 1 : 2 * num_sequences + 1] = stops
        if num_rows == num_sequences:
            ids[:] = [seq.token_ids[0] for seq in batch]
            positions[:] = starts
            owner = np.arange(num_sequences)
        else:
            for i, seq in enumerate(batch):
                ids[bounds[i] : bounds[i + 1]] = seq.token_ids
            owner = np.repeat(np.arange(num_sequences), sizes)
            positions[:] = np.arange(num_rows) - (bounds[:-1] - starts)[owner]
        tables.fill(0)
        for i, seq in enumerate(batch):
            count = min(len(seq.block_table), width)
            tables[i, :count] = seq.block_table[:count]
        kv_index[:] = tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        rows_at = 2 * num_sequences + 1 + num_sequences * width
        num_logit_rows = self._fill_logit_rows(batch, bounds, narrow[rows_at:])

        packed = torch.from_numpy(staging)
        device_copy = packed if self._is_host else packed.to(self.base.device)
        wide, thin = device_copy[: 3 * num_rows].view(3, num_rows), device_copy[3 * num_rows :].view(torch.int32)
        ctx = ForwardContext(
            positions=wide[1],
            cu_seqlens_q=thin[: num_sequences + 1],
            kv_lens=thin[num_sequences + 1 : 2 * num_sequences + 1],
            block_tables=thin[2 * num_sequences + 1 : rows_at].view(num_sequences, width),
            kv_index=wide[2],
            kv=self.kv,
            work=self._work_list(batch, bounds),
            lora=self.lora,
            sparse=self.sparse,
            kv_regimes=self._regimes(batch, owner),
        )
        logit_rows = None if num_logit_rows == num_rows else thin[rows_at : rows_at + num_logit_rows]
        return ctx, wide[0], logit_rows

    def _check(self, batch: Sequence[ScheduledSequence], sizes: Any, starts: Any) -> None:
        if not len(batch) or sizes.min() < 1:
            raise ValueError("a step needs at least one sequence, and each at least one token")
        if starts.min() < 0 or (starts + sizes).max() > self.base.max_context:
            raise ValueError(f"positions {starts.min()}..{(starts + sizes).max()} leave 0..{self.base.max_context}")
        for seq in batch:
            if len(seq.block_table) * BLOCK_SIZE < seq.stop:
                raise ValueError(
                    f"sequence {seq.seq_id} has {len(seq.block_table)} blocks for {seq.stop} positions; "
                    f"a block holds {BLOCK_SIZE}"
                )

    def _reserve(self, count: int) -> Any:
        """A staging array of ``count`` int64; on the host the step's tensors live in it, so it is not shared then."""
        if self._is_host:
            return np.empty(count, dtype=np.int64)
        if len(self._staging) < count:
            self._staging = np.empty(2 * count, dtype=np.int64)
        return self._staging[:count]

    @staticmethod
    def _fill_logit_rows(batch: Sequence[ScheduledSequence], bounds: Any, out: Any) -> int:
        count = 0
        for i, seq in enumerate(batch):
            if seq.logits == "last":
                out[count] = bounds[i + 1] - 1
                count += 1
            elif seq.logits == "all":
                size = len(seq.token_ids)
                out[count : count + size] = np.arange(bounds[i], bounds[i + 1])
                count += size
            elif seq.logits != "none":
                raise ValueError(f"logits {seq.logits!r} is unknown; allowed: none, last, all")
        return count

    def _work_list(self, batch: Sequence[ScheduledSequence], bounds: Any) -> WorkList | None:
        """Rows by binding. A part joins at its start position, so a sequence may fall into several runs."""
        runs: list[Run] = []
        for i, seq in enumerate(batch):
            if not seq.parts:
                continue
            row = int(bounds[i]) - seq.start
            joins = [part[3] for part in seq.parts if part[3] > seq.start]
            edges = (
                sorted({seq.start, seq.stop, *(j for j in joins if j < seq.stop)}) if joins else (seq.start, seq.stop)
            )
            for begin, end in pairwise(edges):
                active = tuple((slot, first, last) for slot, first, last, since in seq.parts if since <= begin)
                if active:
                    runs.append((row + begin, end - begin, active))
        if not runs:
            return None
        num_rows = int(bounds[-1])
        if runs != self._runs or num_rows != self._num_rows or self._work is None:
            self._work = build_work_list_runs(runs, num_rows, self.base.device)
            self._runs, self._num_rows = runs, num_rows
        return self._work

    def _regimes(self, batch: Sequence[ScheduledSequence], owner: Any) -> Tensor | None:
        if not self.base.has_kv_regimes:
            return None
        per_sequence = np.array([self.base.kv_regime(max(seq.length, seq.stop)) for seq in batch], dtype=np.int64)
        if not per_sequence.any():
            return None
        return torch.from_numpy(per_sequence[owner]).to(self.base.device)
