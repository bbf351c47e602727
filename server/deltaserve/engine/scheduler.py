"""Which tokens the next step computes.

Decodes first (one token each), then prompts in chunks, oldest first, inside one token budget. A waiting sequence whose
adapter is not on the device is passed over, never waited for; ``turn.py`` sees to it that its turn comes. When blocks
run out the youngest running sequence is preempted and computed again later. The rows of an ensemble are one in all of
this: they stand side by side in the queues and start, are computed, preempted and finished together.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter

from deltaserve.adapters.residency import AdapterResidency
from deltaserve.engine.batch import PrefixFill, ScheduledPart, ScheduledSequence
from deltaserve.engine.block_manager import BlockManager
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.lockstep import chunk_sizes
from deltaserve.engine.seating import acquire, by_row, seat_rows
from deltaserve.engine.sequence import Sequence, SequenceState
from deltaserve.engine.turn import Turn
from deltaserve.errors import AdapterUnavailable, CompositionRefused, DeltaserveError, InvalidRequest
from deltaserve_kernels import PrefixTables

MAX_ALL_ROWS = 64
"""Most tokens of a step whose every position needs logits: [64, vocab] float32 is held at once for them."""

MAX_PLANNED = 64
"""How many waiting sequences' adapters are loaded ahead."""

_BY_PRIORITY = attrgetter("priority")


@dataclass(slots=True)
class Schedule:
    """One step: ``batch[i]`` is what ``seqs[i]`` computes. ``refused``: an adapter failed, has no place beside the
    others, or leaves the prompt no room. ``has_ensembles``: some of ``seqs`` are in lock-step, side by side.
    ``is_short``: an ensemble waits for more of the token budget than older work left of it."""

    batch: list[ScheduledSequence] = field(default_factory=list)
    seqs: list[Sequence] = field(default_factory=list)
    refused: list[tuple[Sequence, DeltaserveError]] = field(default_factory=list)
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_all_rows: int = 0
    num_preempted: int = 0
    has_ensembles: bool = False
    is_short: bool = False


class Scheduler:
    """Owns the two queues. ``waiting`` and ``running`` are ordered by priority (arrival; probes a little later).

    ``kv_regime(length)``: which rope frequencies a sequence of that length uses (``BaseModel.kv_regime``).
    ``prefixes``: those of the adapters on the device.
    """

    def __init__(
        self,
        blocks: BlockManager,
        residency: AdapterResidency,
        limits: EngineLimits,
        *,
        kv_regime: Callable[[int], int] | None = None,
        patience_seconds: float = 0.5,
        prefixes: PrefixTables | None = None,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._blocks = blocks
        self._residency = residency
        self._limits = limits
        self._kv_regime = kv_regime
        self._prefixes = prefixes
        self._turn = Turn(residency, patience_seconds)

    def add(self, seq: Sequence) -> None:
        for row in seq.rows:
            self._residency.hold(row.versions)
            insort(self.waiting, row, key=_BY_PRIORITY)

    def finish(self, seq: Sequence) -> None:
        """The sequence ends, in whatever state it is: everything it holds is given back. Idempotent."""
        if seq.state is SequenceState.FINISHED:
            return
        for row in seq.rows:
            if row.state is SequenceState.RUNNING:
                self._stop_running(row)
            else:
                self.waiting.remove(row)
            row.state = SequenceState.FINISHED
            self._residency.unhold(row.versions)

    def schedule(self, now: float) -> Schedule:
        step = Schedule()
        self._renew_regimes(step)
        self._schedule_decodes(step)
        self._schedule_prefills(step)
        self._residency.plan(self._wanted_versions())
        # Where every running sequence had to be preempted, one starts again at once: nothing else would be computed.
        if not step.is_short and (not step.num_preempted or not self.running):
            self._start_waiting(step, now)
        return step

    # ------------------------------------------------------------ running sequences

    def _renew_regimes(self, step: Schedule) -> None:
        """A sequence that grew into other rope frequencies cannot read its old K: all of it is computed again."""
        if self._kv_regime is None:
            return
        for seq in [s for s in self.running if s.kv_regime != self._kv_regime(s.num_positions)]:
            if seq.state is SequenceState.RUNNING:
                self._preempt(seq, step)

    def _schedule_decodes(self, step: Schedule) -> None:
        for seq in [seq for seq in self.running if seq.is_decoding]:
            if seq.lockstep is not None:
                self._decode_together(seq, step)
                continue
            while seq.state is SequenceState.RUNNING and not self._blocks.extend(seq):
                self._preempt(self.running[-1], step)
            if seq.state is SequenceState.RUNNING and self._budget_left(step):
                self._schedule(seq, 1, step)
                step.num_decode_tokens += 1

    def _decode_together(self, seq: Sequence, step: Schedule) -> None:
        """One token of every row, or of none. The youngest of all is preempted with its whole ensemble, so it is never
        one that has been scheduled already."""
        while seq.state is SequenceState.RUNNING and not all(map(self._blocks.extend, seq.rows)):
            self._preempt(self.running[-1], step)
        if seq.state is SequenceState.RUNNING and self._budget_left(step) >= len(seq.rows):
            for row in seq.rows:
                self._schedule(row, 1, step)
            step.num_decode_tokens += len(seq.rows)
            step.has_ensembles = True

    def _schedule_prefills(self, step: Schedule) -> None:
        for seq in self.running:
            if not seq.is_decoding:
                self._schedule_chunk(seq, step)

    def _schedule_chunk(self, seq: Sequence, step: Schedule) -> None:
        if seq.lockstep is not None:
            self._schedule_chunks(seq, step)
            return
        num_tokens = min(seq.num_uncomputed_tokens, self._budget_left(step))
        if seq.wants_all_rows:
            num_tokens = min(num_tokens, MAX_ALL_ROWS - step.num_all_rows)
            step.num_all_rows += num_tokens
        if num_tokens:
            self._schedule(seq, num_tokens, step)
            step.num_prefill_tokens += num_tokens

    def _schedule_chunks(self, seq: Sequence, step: Schedule) -> None:
        """Chunks of all rows of an ensemble."""
        if not seq.leads:
            return
        budget = self._budget_left(step)
        sizes = chunk_sizes(seq.rows, budget, MAX_ALL_ROWS - step.num_all_rows)
        step.is_short |= not any(sizes) and budget < len(seq.rows)
        step.num_all_rows += sum(sizes) if seq.wants_all_rows else 0
        for row, num_tokens in zip(seq.rows, sizes, strict=True):
            if num_tokens:
                self._schedule(row, num_tokens, step)
                step.num_prefill_tokens += num_tokens
                step.has_ensembles = True

    def _schedule(self, seq: Sequence, num_tokens: int, step: Schedule) -> None:
        start, length = seq.num_computed_tokens, len(seq.token_ids)
        stop = start + num_tokens
        skipped = seq.num_prefix_tokens
        prefix = None
        if seq.first_prefix_block >= 0:
            prefix = PrefixFill(seq.prefixes, seq.first_prefix_block, seq.kv_regime)
            seq.first_prefix_block = -1
            step.num_prefill_tokens += prefix.num_rows  # may overdraw the budget, once: the next sequence waits
        seq.num_scheduled_tokens = num_tokens
        step.seqs.append(seq)
        step.batch.append(
            ScheduledSequence(
                seq_id=seq.seq_id,
                token_ids=seq.token_ids[start:stop],
                start=skipped + start,
                block_table=seq.block_table,
                parts=seq.parts,
                logits="all" if seq.wants_all_rows else "last" if stop == length else "none",
                length=skipped + length,
                prefix=prefix,
            )
        )

    def _budget_left(self, step: Schedule) -> int:
        return max(0, self._limits.max_num_batched_tokens - step.num_decode_tokens - step.num_prefill_tokens)

    # ------------------------------------------------------------ waiting sequences

    def _wanted_versions(self) -> Iterator[str]:
        with_adapter = (seq for seq in self.waiting if seq.versions)
        return (version for seq in islice(with_adapter, MAX_PLANNED) for version in seq.versions)

    def _start_waiting(self, step: Schedule, now: float) -> None:
        self._turn.begin_step(self.waiting, self.running, now)
        absent: set[tuple[str, ...]] = set()  # bindings already found not to be on the device in this step
        for seq in list(self.waiting):
            if not self._budget_left(step) or len(self.running) >= self._limits.max_num_seqs:
                return
            if not seq.is_ready_to_share or not seq.leads:
                continue
            if seq.needed_versions in absent or self._turn.holds_back(seq):
                slots = None
            else:
                try:
                    slots = acquire(seq, self._residency)
                except (AdapterUnavailable, CompositionRefused) as error:
                    step.refused.append((seq, error))
                    continue
            if slots is None:
                absent.add(seq.needed_versions)
                if seq.adapter_blocked_since is None:
                    seq.adapter_blocked_since = now
                continue
            self._turn.end(seq)
            if self._prefixes is not None and not self._prefixes.is_empty:
                try:
                    seat_rows(seq, slots, self._prefixes, self._limits, self._blocks.num_blocks)
                except InvalidRequest as error:
                    self._residency.release(seq.needed_versions)
                    step.refused.append((seq, error))
                    continue
            if not self._start(seq, slots, now):
                return
            self._schedule_chunk(seq, step)

    def _start(self, seq: Sequence, slots: tuple[int, ...], now: float) -> bool:
        """Seat a sequence, all its rows, whose adapters are pinned; False (and unpinned again) when seats or the KV
        cache have no room. Nobody younger starts then, so that room for all rows comes."""
        if seq.adapter_blocked_since is not None:
            seq.adapter_wait_seconds += now - seq.adapter_blocked_since
            seq.adapter_blocked_since = None
        rows = seq.rows
        for row in rows:
            self._set_regime(row)
        # Running sequences grow: leave them a few blocks, or they would preempt the newcomer at once.
        reserve = 1 + self._blocks.num_blocks // 100 if self.running else 0
        has_seats = len(self.running) + len(rows) <= self._limits.max_num_seqs
        if not has_seats or not self._blocks.begin(*rows, reserve=reserve):
            self._residency.release(seq.needed_versions)
            return False
        for row, own in by_row(seq, slots):
            if row.started_seconds is None:
                row.started_seconds = now
                row.num_cached_tokens = row.num_computed_tokens
            row.parts = tuple(
                ScheduledPart(slot, part.scale_first, part.scale_last, part.start_position)
                for slot, part in zip(own, row.binding.parts, strict=True)
                if self._prefixes is None or not self._prefixes.has_slot(slot)  # rows of the base behind a prefix
            )
            row.state = SequenceState.RUNNING
            self.waiting.remove(row)
            insort(self.running, row, key=_BY_PRIORITY)
        return True

    def _set_regime(self, seq: Sequence) -> None:
        regime = self._kv_regime(seq.num_positions) if self._kv_regime else 0
        if regime != seq.kv_regime:
            seq.kv_regime = regime
            seq.block_keys = []

    def _preempt(self, seq: Sequence, step: Schedule) -> None:
        """Blocks and pins go back; tokens sampled so far stay, and the sequence keeps its place in the queue."""
        for row in seq.rows:
            self._stop_running(row)
            row.state = SequenceState.WAITING
            insort(self.waiting, row, key=_BY_PRIORITY)
            step.num_preempted += 1

    def _stop_running(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._blocks.release(seq)
        self._residency.release(seq.versions)
        seq.parts = ()

    # ------------------------------------------------------------ books

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` unless queues, blocks, pins and bytes agree."""
        for queue, state in ((self.waiting, SequenceState.WAITING), (self.running, SequenceState.RUNNING)):
            if any(seq.state is not state for seq in queue):
                raise RuntimeError(f"a sequence in the {state} queue is in another state")
            if queue != sorted(queue, key=_BY_PRIORITY):
                raise RuntimeError(f"the {state} queue is out of order")
            if any(row.state is not state for seq in queue for row in seq.rows):
                raise RuntimeError(f"rows of an ensemble in the {state} queue are apart")
        if any(seq.block_table for seq in self.waiting):
            raise RuntimeError("a waiting sequence holds blocks")
        self._blocks.check_integrity(self.running)
        pins = Counter(version for seq in self.running for version in seq.versions)
        self._residency.check_integrity(pins)
