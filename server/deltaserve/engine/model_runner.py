"""Turns the sequences of one step into tensors, runs the base over all of them at once, returns logits.

Everything the device needs for a step (ids, positions, block tables, row ranges) travels in one copy; what adapters
ask of the rows is ``row_lists``. Decode steps that ``DecodeGraphs`` has a graph for are replayed; everything else is
launched operator by operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.engine.batch import ScheduledSequence, check_batch
from deltaserve.engine.decode_graphs import DecodeGraphs
from deltaserve.engine.prefix_fill import copy_prefixes, passes
from deltaserve.engine.row_lists import RowListMaker, Run
from deltaserve.model.base import BaseModel
from deltaserve.model.context import ForwardContext
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache
from deltaserve_kernels import (
    ApartRows,
    PaddedLayout,
    PrefixTables,
    VectorRows,
    VocabularyStep,
    select,
    split_vocabulary,
    upload,
)

# Rows of a rehearsal that enters products several times: what compiles for few rows has compiled for many.
MOST_ROWS_FANNED_OUT = 64
NO_TABLES = DeltaTables()


class ModelRunner:
    """Runs steps; owned by the engine thread. The tables may change between steps, never during one."""

    def __init__(
        self,
        base: BaseModel,
        kv: KVCache,
        tables: DeltaTables = NO_TABLES,
        *,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.base = base
        self.kv = kv
        self.lora = tables.lora
        self.sparse = tables.sparse
        self.vectors = tables.vectors
        self.apart = tables.apart
        self.vocabulary = tables.vocabulary
        self.blocks = tables.blocks
        self.prefixes = tables.prefixes
        self.graphs = graphs
        self._is_host = base.device.type == "cpu"
        self._staging = np.empty(0, dtype=np.int64)
        self.row_lists = RowListMaker(tables, base.device)

    @torch.inference_mode()
    def execute(self, batch: Sequence[ScheduledSequence]) -> Tensor:
        """Float32 [R, vocab] on the base's device: in batch order, 0 ("none"), 1 ("last") or all rows a sequence.

        Valid until the next call. Raises ValueError when a sequence is empty, exceeds the context or its block table.
        """
        sizes = np.fromiter((len(seq.token_ids) for seq in batch), dtype=np.int64, count=len(batch))
        starts = np.fromiter((seq.start for seq in batch), dtype=np.int64, count=len(batch))
        check_batch(batch, sizes, starts, self.base.max_context)
        if self.base.device.index is not None:  # Triton launches on the calling thread's device
            torch.cuda.set_device(self.base.device)
        if self.prefixes is not None and not self.prefixes.is_empty:
            self._fill_prefixes(batch, self.prefixes)
        if self.graphs is not None and not self._is_eager(batch):
            logits = self.graphs.run(batch)
            if logits is not None:
                return logits
        return self._forward(*self._prepare(batch, sizes, starts))

    @torch.inference_mode()
    def rehearse(self, batch: Sequence[ScheduledSequence]) -> None:
        """Run a step launching every operator of every kind of term, though no row has an adapter."""
        sizes = np.array([len(seq.token_ids) for seq in batch])
        ctx, input_ids, logit_rows = self._prepare(batch, sizes, np.array([seq.start for seq in batch]))
        layout = PaddedLayout(len(input_ids))
        empty = layout.work_list(torch.zeros(layout.size, dtype=torch.int32, device=self.base.device))
        # Planes as for one adapter a row; more would only take memory.
        ctx.work = replace(empty, num_planes=len(input_ids), has_prompts=len(input_ids) > len(batch))
        if self.vectors is not None:
            fans_out = len(input_ids) <= MOST_ROWS_FANNED_OUT
            ctx.vectors = VectorRows(self.vectors, ctx.work, fans_out=fans_out, max_factors=1)
        ctx.blocks = self.blocks
        if self.apart is not None:
            ctx.apart = ApartRows(self.apart, ctx.work)
        if self.vocabulary is not None:
            count = len(input_ids) if logit_rows is None else len(logit_rows)
            layout = PaddedLayout(count)
            head = layout.work_list(torch.zeros(layout.size, dtype=torch.int32, device=self.base.device))
            head = replace(head, num_planes=count, has_prompts=ctx.work.has_prompts)
            # Wider logits are no launch less than those of the base's width.
            ctx.vocabulary = VocabularyStep(self.vocabulary, ctx.work, head, self.base.vocab_size + 1)
        self._forward(ctx, input_ids, logit_rows)

    def warm_up(self, max_tokens: int = 2 * BLOCK_SIZE) -> None:
        """Run every kind of step once and capture the graphs, so that no request pays for first calls.

        Writes into the first blocks of the cache: call it before anything is in there. ``max_tokens``: the largest
        step to come. Triton compiles a kernel when it first meets its arguments' kinds: all of them are met here.
        """
        table = tuple(range(min(self.kv.num_blocks, max(2, -(-max_tokens // BLOCK_SIZE)))))
        longest = min(len(table) * BLOCK_SIZE, self.base.max_context)
        length = min(longest, 2 * BLOCK_SIZE)
        self.execute([ScheduledSequence(0, (0,) * max(length - 1, 1), 0, table)])
        if length > 1:
            self.execute([ScheduledSequence(0, (0,), length - 1, table, logits="all")])
        if select(self.base.device) == "triton":
            for batch in rehearsals(table, longest):
                self.rehearse(batch)
        if self.graphs is not None:
            self.graphs.capture()
        self.kv.pool.zero_()

    def _forward(self, ctx: ForwardContext, input_ids: Tensor, logit_rows: Tensor | None) -> Tensor:
        hidden = self.base.forward(input_ids, ctx)
        if logit_rows is None:
            return self.base.logits(hidden, ctx)
        if not len(logit_rows):
            return torch.empty(0, self.base.vocab_size, device=self.base.device)
        return self.base.logits(hidden.index_select(0, logit_rows), ctx)

    def _prepare(
        self, batch: Sequence[ScheduledSequence], sizes: Any, starts: Any
    ) -> tuple[ForwardContext, Tensor, Tensor | None]:
        """Context, input ids int64 [T] and the rows that need logits (None: every row)."""
        num_sequences = len(batch)
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

        device_copy = upload(torch.from_numpy(staging), self.base.device)
        wide, thin = device_copy[: 3 * num_rows].view(3, num_rows), device_copy[3 * num_rows :].view(torch.int32)
        lists = self.row_lists.of(batch, starts, bounds)
        asked = None if num_logit_rows == num_rows else narrow[rows_at : rows_at + num_logit_rows].tolist()
        ctx = ForwardContext(
            positions=wide[1],
            cu_seqlens_q=thin[: num_sequences + 1],
            kv_lens=thin[num_sequences + 1 : 2 * num_sequences + 1],
            block_tables=thin[2 * num_sequences + 1 : rows_at].view(num_sequences, width),
            kv_index=wide[2],
            kv=self.kv,
            work=lists.work,
            lora=self.lora,
            sparse=self.sparse,
            vectors=lists.vectors,
            apart=lists.apart,
            vocabulary=self._vocabulary_step(lists.runs, num_rows, asked),
            blocks=lists.blocks,
            found=lists.found,
            kv_regimes=self._regimes(batch, owner),
            is_decode=num_rows == num_sequences,
        )
        logit_rows = None if num_logit_rows == num_rows else thin[rows_at : rows_at + num_logit_rows]
        return ctx, wide[0], logit_rows

    def _fill_prefixes(self, batch: Sequence[ScheduledSequence], tables: PrefixTables) -> None:
        copy_prefixes(batch, tables, self.kv.pool)
        for virtual, embeddings in passes(batch, tables):
            sizes = np.array([seq.num_tokens for seq in virtual])
            ctx, ids, _ = self._prepare(virtual, sizes, np.array([seq.start for seq in virtual]))
            ctx.vocabulary = None  # there is no token whose rows could have changed
            self.base.decode_embeddings(embeddings, ids[:0], ctx.positions, ctx)

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

    def _vocabulary_step(
        self, of_step: Sequence[Run], num_rows: int, logit_rows: list[int] | None
    ) -> VocabularyStep | None:
        """The rows that change the embedding or the head."""
        family = self.vocabulary
        if family is None or family.is_empty:
            return None
        runs = [run for run in of_step if any(family.has_slot(slot) for slot, _, _ in run[2])]
        return split_vocabulary(runs, num_rows, logit_rows, family, self.base.device) if runs else None

    def _is_eager(self, batch: Sequence[ScheduledSequence]) -> bool:
        """Whether some row has terms that captured graphs do not know."""
        families = {"vectors": self.vectors, "apart": self.apart, "vocabulary": self.vocabulary, "blocks": self.blocks}
        known = () if self.graphs is None else self.graphs.families
        held = [f for name, f in families.items() if name not in known and f is not None and not f.is_empty]
        return bool(held) and any(f.has_slot(part[0]) for seq in batch for part in seq.parts for f in held)

    def _regimes(self, batch: Sequence[ScheduledSequence], owner: Any) -> Tensor | None:
        if not self.base.has_kv_regimes:
            return None
        per_sequence = np.array([self.base.kv_regime(max(seq.length, seq.stop)) for seq in batch], dtype=np.int64)
        if not per_sequence.any():
            return None
        return upload(torch.from_numpy(per_sequence[owner]), self.base.device)


def rehearsals(table: Sequence[int], longest: int) -> list[list[ScheduledSequence]]:
    """Steps of every shape that launches tell apart: one row, some rows, prompts of rising lengths, both together."""

    def sequence(start: int, count: int) -> ScheduledSequence:
        return ScheduledSequence(0, (0,) * count, start, table)

    lengths = [length for length in (2, 15, 16, 33, *(1 << i for i in range(6, 20))) if length < longest]
    batches = [[sequence(0, length)] for length in (*lengths, longest)]
    for count in (1, 2, 16, 17):
        batches.append([sequence(longest - 1, 1)] * count)
    if longest > 3:
        batches.append([sequence(longest - 1, 1), sequence(0, longest - 2)])
    return batches
