"""The engine: requests in, one outcome per step out. No threads, no HTTP, no text.

All of it belongs to one thread (``async_engine.py`` runs it).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from deltaserve.adapters.residency import AdapterResidency
from deltaserve.core import Binding, FinishReason, GenerationRequest, StepStats, TokenLogprob
from deltaserve.engine.batch import ScheduledSequence
from deltaserve.engine.block_manager import BLOCK_SIZE, BlockManager
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.live_probe import LiveProbe, make_probe_sequence
from deltaserve.engine.live_request import LiveRequest, make_sequences
from deltaserve.engine.lockstep import mix_rows
from deltaserve.engine.not_numbers import not_numbers
from deltaserve.engine.outcome import Outcome
from deltaserve.engine.sampler import Sampler
from deltaserve.engine.scheduler import Schedule, Scheduler
from deltaserve.engine.sequence import Sequence
from deltaserve.errors import DeltaserveError, RequestTimeout
from deltaserve_kernels import upload


class Runner(Protocol):
    """Runs the model over the sequences of a step (``ModelRunner``)."""

    def execute(self, batch: list[ScheduledSequence]) -> Tensor:
        """Float32 [R, vocab]: in batch order 0, 1 or all rows per sequence, as its ``logits`` says."""
        ...


class Engine:
    """``step`` until nothing is left. Between steps: ``add``, ``add_probe``, ``abort``, ``stop``, ``expire``."""

    def __init__(
        self,
        runner: Runner,
        residency: AdapterResidency,
        blocks: BlockManager,
        scheduler: Scheduler,
        sampler: Sampler,
        limits: EngineLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        limits.check_blocks(blocks.num_blocks, BLOCK_SIZE)
        self.residency = residency
        self.limits = limits
        self.clock = clock
        self.num_unstarted = 0
        self._runner = runner
        self._blocks = blocks
        self._scheduler = scheduler
        self._sampler = sampler
        self._requests: dict[str, LiveRequest] = {}
        self._probes: dict[str, LiveProbe] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._seq_ids: Iterator[int] = count()
        self._outcome = Outcome()

    def step(self) -> Outcome:
        """Schedule, execute, update."""
        began = self.clock()
        self.residency.poll()
        schedule = self._scheduler.schedule(began)
        if schedule.batch:
            self._update(schedule, self._runner.execute(schedule.batch))
        self._refuse(schedule)
        return self._take_outcome(schedule, began)

    # ------------------------------------------------------------ between steps

    def check(self, request: GenerationRequest) -> None:
        """Raises as ``limits.check`` does, and ``EnsembleRefused`` for members that never fit beside each other.
        Callable from any thread."""
        self.limits.check(request)
        if request.ensemble is not None:
            self.limits.check_slots(request.versions, self.residency.pool.num_slots)
            longest = len(request.prompt_ids) + request.sampling.max_tokens
            lengths = [binding.num_prefix_tokens + longest for binding in request.bindings]
            self.limits.check_rows(lengths, self._blocks.num_blocks, BLOCK_SIZE)

    def add(self, request: GenerationRequest, arrival_seconds: float, labels: tuple[str, ...] = ()) -> None:
        """Queue a request that ``check`` has passed; ``labels`` are its adapters' names for metrics."""
        sequences = make_sequences(request, arrival_seconds, self._seq_ids)
        live = LiveRequest(request, sequences, arrival_seconds, labels=labels)
        if request.deadline_seconds is not None:
            live.deadline_seconds = arrival_seconds + request.deadline_seconds
            heapq.heappush(self._deadlines, (live.deadline_seconds, request.request_id))
        self._requests[request.request_id] = live
        self.num_unstarted += 1
        for seq in sequences:
            self._scheduler.add(seq)

    def add_probe(self, probe_id: str, prompt_ids: tuple[int, ...], binding: Binding, arrival_seconds: float) -> None:
        """Queue a probe that ``limits.check_prompt`` and ``check_binding`` have passed."""
        seq = make_probe_sequence(probe_id, prompt_ids, binding, arrival_seconds, next(self._seq_ids))
        self._probes[probe_id] = LiveProbe(seq)
        self._scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """Whoever asked is gone: free everything, tell nobody. Unknown (already finished) ids are fine."""
        probe = self._probes.pop(request_id, None)
        if probe is not None:
            self._scheduler.finish(probe.seq)
        live = self._requests.get(request_id)
        if live is not None:
            self._close(live, FinishReason.ABORT)

    def fail(self, request_id: str, error: DeltaserveError) -> None:
        """End a request or probe with an error that its sender hears."""
        self._outcome.failures.append((request_id, error))
        probe = self._probes.pop(request_id, None)
        if probe is not None:
            self._scheduler.finish(probe.seq)
        live = self._requests.get(request_id)
        if live is not None:
            self._close(live, FinishReason.ERROR)

    def stop(self, request_id: str, index: int) -> None:
        """A stop string was found in a sequence's text: it ends as if by a stop token."""
        live = self._requests.get(request_id)
        if live is None or not 0 <= index < len(live.sequences):
            return
        if live.sequences[index].finish_reason is None:
            self._end(live, live.sequences[index], FinishReason.STOP)

    def expire(self) -> None:
        """Fail the requests whose deadline has passed."""
        now = self.clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            live = self._requests.get(request_id)
            if live is not None and live.deadline_seconds == deadline:
                text = f"The request was not finished within {live.request.deadline_seconds:g} seconds."
                self.fail(request_id, RequestTimeout(text))

    @property
    def base_fingerprint(self) -> str:
        return self._blocks.base_fingerprint

    @property
    def next_deadline(self) -> float | None:
        return self._deadlines[0][0] if self._deadlines else None

    @property
    def open_ids(self) -> list[str]:
        """Requests and probes not finished yet."""
        return [*self._requests, *self._probes]

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def num_blocks_used(self) -> int:
        return self._blocks.num_used

    @property
    def num_blocks_total(self) -> int:
        return self._blocks.num_blocks

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` unless requests, queues, blocks, pins, slots and bytes all agree."""
        self._scheduler.check_integrity()
        open_leads = [seq for live in self._requests.values() for seq in live.sequences if not seq.finish_reason]
        open_seqs = {row.seq_id for seq in open_leads for row in seq.rows}
        open_seqs |= {probe.seq.seq_id for probe in self._probes.values()}
        queued = {seq.seq_id for seq in (*self._scheduler.waiting, *self._scheduler.running)}
        if open_seqs != queued:
            raise RuntimeError(f"sequences {sorted(open_seqs ^ queued)} are open or queued, but not both")
        if self.num_unstarted != sum(not live.is_started for live in self._requests.values()):
            raise RuntimeError("the count of requests not started is wrong")

    # ------------------------------------------------------------ update

    def _update(self, schedule: Schedule, logits: Tensor) -> None:
        now = self.clock()
        offset = 0
        rows: list[int] = []
        seqs: list[Sequence] = []
        for seq, scheduled in zip(schedule.seqs, schedule.batch, strict=True):
            if len(seq.token_ids) == seq.num_prompt_tokens:
                self._note_start(seq)
            began = seq.num_computed_tokens
            seq.num_computed_tokens = began + seq.num_scheduled_tokens
            self._blocks.commit(seq)
            first = offset
            offset += 0 if scheduled.logits == "none" else 1 if scheduled.logits == "last" else scheduled.num_tokens
            if scheduled.logits == "all":
                self._collect(seq, logits[first:offset], began)
            if seq.num_computed_tokens < len(seq.token_ids):
                continue
            seq.has_prompt_rows = True
            if seq.is_probe:
                self._finish_probe(seq)
            elif seq.sampling.max_tokens:
                rows.append(offset - 1)
                seqs.append(seq)
            elif seq.rows[-1] is seq:
                self._end(self._requests[seq.request_id], seq.rows[0], FinishReason.LENGTH)
        if seqs:
            wanted = logits if len(rows) == len(logits) else logits[rows]
            self._accept(*(mix_rows(wanted, seqs) if schedule.has_ensembles else (wanted, seqs)), now)

    def _accept(self, rows: Tensor, seqs: list[Sequence], now: float) -> None:
        """One row per sequence: sample, record, end what is finished."""
        tokens = self._sampler.sample(rows, seqs)
        logprobs = self._logprobs(rows, seqs, tokens)
        touched: dict[str, LiveRequest] = {}
        for seq, token in zip(seqs, tokens, strict=True):
            live = self._requests.get(seq.request_id)
            if live is None:  # A sibling failed in this very loop and took the request with it.
                continue
            if token < 0:
                self.fail(seq.request_id, not_numbers(live.request))
                touched.pop(seq.request_id, None)
                continue
            live.accept(seq, token, logprobs.get(seq.seq_id), now)
            if seq.finish_reason is not None:
                self._scheduler.finish(seq)
            touched[seq.request_id] = live
        for live in touched.values():
            self._tell(live)

    def _logprobs(self, rows: Tensor, seqs: list[Sequence], tokens: list[int]) -> dict[int, TokenLogprob]:
        """By sequence id, for those that ask for log probabilities."""
        asking = [i for i, seq in enumerate(seqs) if seq.sampling.logprobs is not None and tokens[i] >= 0]
        if not asking:
            return {}
        wanted = [seqs[i].sampling.logprobs or 0 for i in asking]
        chosen = rows.index_select(0, upload(torch.tensor(asking), rows.device))
        found = self._sampler.logprobs(chosen, [tokens[i] for i in asking], max(wanted))
        return {
            seqs[i].seq_id: TokenLogprob(entry.token_id, entry.logprob, entry.top[:num_top])
            for i, entry, num_top in zip(asking, found, wanted, strict=True)
        }

    def _collect(self, seq: Sequence, rows: Tensor, start: int) -> None:
        """Rows of the prompt's tokens from ``start`` on; row i is about the token at ``start + i + 1``."""
        if seq.is_probe:
            # A step is as wide as the adapter in it with the most tokens.
            own = max(self._sampler.vocab_size, seq.binding.num_token_ids)
            self._probes[seq.request_id].collect(rows[:, :own], start)
            return
        if seq.lockstep is not None:
            mixed = seq.lockstep.gather(rows)
            if mixed is None:
                return
            rows = mixed
        told = self._requests[seq.request_id].prompt_logprobs
        del told[start + 1 :]  # computed a second time after a preemption
        targets = seq.token_ids[start + 1 : start + 1 + len(rows)]
        told += self._sampler.logprobs(rows[: len(targets)], targets, seq.sampling.prompt_logprobs or 0)

    def _note_start(self, seq: Sequence) -> None:
        live = self._requests.get(seq.request_id)
        if live is not None and not live.is_started:
            live.is_started = True
            self.num_unstarted -= 1

    def _finish_probe(self, seq: Sequence) -> None:
        probe = self._probes.pop(seq.request_id)
        self._scheduler.finish(seq)
        self._outcome.probes.append((seq.request_id, probe.result()))

    def _end(self, live: LiveRequest, seq: Sequence, reason: FinishReason) -> None:
        live.end(seq, reason)
        self._scheduler.finish(seq)
        self._tell(live)

    def _tell(self, live: LiveRequest) -> None:
        if live.is_silent:
            return
        output = live.take_output()
        self._outcome.outputs.append(output)
        if output.is_finished:
            self._close(live, live.sequences[0].finish_reason or FinishReason.STOP)

    def _close(self, live: LiveRequest, outcome: FinishReason) -> None:
        """The request is over: free what is left of it and measure it."""
        for seq in live.sequences:
            seq.finish_reason = seq.finish_reason or outcome
            self._scheduler.finish(seq)
        if not live.is_started:
            self.num_unstarted -= 1
        del self._requests[live.request.request_id]
        self._outcome.finished.append((live.stats(outcome, self.clock()), live.labels))

    def _refuse(self, schedule: Schedule) -> None:
        for seq, error in schedule.refused:
            if seq.request_id in self._requests or seq.request_id in self._probes:
                self.fail(seq.request_id, error)

    def _take_outcome(self, schedule: Schedule, began: float) -> Outcome:
        outcome, self._outcome = self._outcome, Outcome()
        if schedule.batch:
            now = self.clock()
            oldest = min((seq.arrival_seconds for seq in self._scheduler.waiting[:1]), default=now)
            outcome.stats = StepStats(
                step_seconds=now - began,
                num_prefill_tokens=schedule.num_prefill_tokens,
                num_decode_tokens=schedule.num_decode_tokens,
                num_running=self.num_running,
                num_waiting=self.num_waiting,
                num_distinct_adapters=len({v for seq in schedule.seqs for v in seq.versions}),
                num_preempted=schedule.num_preempted,
                num_blocks_used=self._blocks.num_used,
                num_blocks_total=self._blocks.num_blocks,
                oldest_wait_seconds=max(0.0, now - oldest),
            )
        return outcome
