"""Decode steps as captured graphs: one for each bucket of rows and each set of term families, all made at start-up.

A *family* is a kind of term with tables of its own (``graph_families``). Which families a step needs is known on the
host from its slots; the graph with no family has no launch for adapters at all. Inside a family adapters are data:
tables say where their numbers are and how many, and a step's list says which rows use them, so no load, eviction, rank
or mixture of them captures anything again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.engine.batch import ScheduledSequence
from deltaserve.engine.graph_capture import Capture, CudaCapture, Pass
from deltaserve.engine.graph_families import MAX_ADDED, Family, default_keys, give, known_families
from deltaserve.engine.static_step import RowBinding, StaticStep
from deltaserve.model.base import BaseModel
from deltaserve.model.context import ForwardContext
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache
from deltaserve_kernels import PaddedLayout

MAX_RANK = 256
"""Ranks that graphs have room for. Adapters of a higher one are served without graphs."""


def buckets(max_seqs: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are made for: 1, 2, 4, then multiples of 8 up to 32, 16 up to 64, 32 beyond."""
    steps = [1, 2, 4, *range(8, 33, 8), *range(48, 65, 16), *range(96, max_seqs + 1, 32)]
    return (*(rows for rows in steps if rows < max_seqs), max_seqs)


class DecodeGraphs:
    """Runs decode steps (one token a sequence, logits "last") of at most ``max_seqs`` sequences by replay.

    ``kv`` needs a scratch block. ``max_blocks``: longest block table (default: the base's whole context). ``max_rank``:
    rank that low-rank terms have room for. ``keys``: the sets of families to capture (default: see
    ``default_keys``); a step takes the smallest one that covers its own, and launches it does not need cost little and
    change nothing. ``row_counts``: the buckets. ``capture``: CUDA graphs unless said otherwise; those need operators
    that look into no tensor, which are the Triton ones.

        graphs = DecodeGraphs(base, KVCache(layout, num_blocks, device, has_scratch=True), tables, max_seqs=64)
        graphs.capture()              # before traffic
        logits = graphs.run(batch)    # [R, vocab], or None: run it with ModelRunner

    For the engine thread alone; the tables may change between steps.
    """

    def __init__(
        self,
        base: BaseModel,
        kv: KVCache,
        tables: DeltaTables,
        *,
        max_seqs: int = 64,
        max_blocks: int | None = None,
        max_rank: int = MAX_RANK,
        keys: Iterable[Iterable[Family]] | None = None,
        row_counts: Iterable[int] | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.base = base
        self.kv = kv
        self.row_counts = tuple(sorted(row_counts)) if row_counts is not None else buckets(max_seqs)
        if max_blocks is None:
            max_blocks = min(-(-base.max_context // BLOCK_SIZE), kv.num_blocks)
        self.step = StaticStep(kv, max_seqs=self.row_counts[-1], max_blocks=max_blocks, has_regimes=base.has_kv_regimes)
        self.families = known_families(base, tables, max_rank=max_rank)
        self._num_slots = {name: family.num_slots() for name, family in self.families.items()}
        self.keys = self._sorted_keys(keys)
        self._capture: Capture = capture or CudaCapture(kv.pool.device)
        self._replays: dict[tuple[int, frozenset[Family]], Pass] = {}
        # Outside of the graphs' pool, where other graphs would overwrite it. Two shapes of one memory: with columns for
        # tokens that adapters add, and without.
        self._vocabulary = tables.vocabulary
        num_rows, width = self.row_counts[-1], base.vocab_size + (MAX_ADDED if "added" in self.families else 0)
        self._wide_logits = torch.zeros(num_rows, width, device=kv.pool.device)
        self._logits = self._wide_logits.view(-1)[: num_rows * base.vocab_size].view(num_rows, -1)

    def _sorted_keys(self, keys: Iterable[Iterable[Family]] | None) -> tuple[frozenset[Family], ...]:
        """Smallest first, the empty one always among them."""
        unique = {frozenset(key) for key in (default_keys(self.families) if keys is None else [[], *keys])}
        for key in unique:
            if not key <= set(self.families):
                raise ValueError(f"families {sorted(key)}: only {sorted(self.families)} have tables")
        return tuple(sorted(unique, key=lambda key: (len(key), sorted(key))))

    @property
    def num_graphs(self) -> int:
        return len(self._replays)

    @torch.inference_mode()
    def capture(self) -> None:
        """Make every graph; tens of milliseconds to a second each. Writes to the scratch block alone."""
        for num_rows in reversed(self.row_counts):
            # Rows that belong to nobody: a trial run must not touch anybody's blocks.
            self.step.fill([], num_rows, [()] * num_rows)
            for key in reversed(self.keys):
                self._replays[num_rows, key] = self._capture(partial(self._pass, num_rows, key))

    @torch.inference_mode()
    def run(self, batch: Sequence[ScheduledSequence]) -> Tensor | None:
        """Float32 [R, vocab], one row a sequence, valid until the next run; None when no graph serves the batch. Where
        an adapter of the step adds tokens there are columns for these too, minus infinity in rows of others.

        The batch must have passed ``check_batch``. No sync: what is in the result is known when the stream has come
        to it.
        """
        if not self._replays or not all(len(seq.token_ids) == 1 and seq.logits == "last" for seq in batch):
            return None
        if not batch or not self.step.fits(batch):
            return None
        bindings = [_active(seq) for seq in batch]
        needed = self._families(bindings)
        key = None if needed is None else next((key for key in self.keys if key >= needed), None)
        # Compositions may need the room of a larger step.
        num_rows = next((rows for rows in self.row_counts if PaddedLayout(rows).fits(bindings)), None)
        if key is None or num_rows is None:
            return None
        regimes = (
            [self.base.kv_regime(max(seq.length, seq.stop)) for seq in batch] if self.base.has_kv_regimes else None
        )
        self.step.fill(batch, num_rows, bindings if key else None, regimes)
        self._replays[num_rows, key]()
        return (
            self._wide_logits[: len(batch), : self._width(bindings)] if "added" in key else self._logits[: len(batch)]
        )

    def _width(self, bindings: list[RowBinding]) -> int:
        """Token ids that some row's adapters have, the base's at least."""
        slots = {slot for binding in set(bindings) for slot, first, last in binding if first or last}
        sizes = map(self._vocabulary.num_token_ids, slots) if self._vocabulary is not None else ()
        return max(self.base.vocab_size, *sizes)

    def _families(self, bindings: list[RowBinding]) -> frozenset[Family] | None:
        """Families that some row's adapters have; None when an adapter or a table has outgrown the graphs."""
        slots = {slot for binding in set(bindings) for slot, _, _ in binding}
        together = [[part[0] for part in binding] for binding in set(bindings) if len(binding) > 1]
        needed = []
        for name, family in self.families.items():
            if family.num_slots() != self._num_slots[name] or any(family.refuses(slot) for slot in slots):
                return None
            if any(map(family.refuses_together, together)):
                return None
            if any(family.has_slot(slot) for slot in slots):
                needed.append(name)
        return frozenset(needed)

    def _pass(self, num_rows: int, key: frozenset[Family]) -> None:
        inputs = self.step.inputs(num_rows)
        ctx = ForwardContext(
            positions=inputs.positions,
            cu_seqlens_q=inputs.cu_seqlens,
            kv_lens=inputs.kv_lens,
            block_tables=inputs.block_tables,
            kv_index=inputs.kv_index,
            kv=self.kv,
            work=inputs.work if key else None,
            kv_regimes=inputs.regimes,
            is_decode=True,
        )
        give(self.families, key, ctx)
        hidden = self.base.forward(inputs.ids, ctx)
        logits = self._wide_logits if "added" in key else self._logits
        self.base.logits(hidden, ctx, out=logits[:num_rows])


def _active(seq: ScheduledSequence) -> RowBinding:
    """The parts that change the row of a decoding sequence: those that joined at its position or before."""
    return tuple((slot, first, last) for slot, first, last, since in seq.parts if since <= seq.start)
