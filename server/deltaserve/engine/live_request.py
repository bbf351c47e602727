"""A request while the engine works on it: its sequences, what this step produced, and the times that are measured."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from deltaserve.core import (
    FinishReason,
    GenerationRequest,
    RequestOutput,
    RequestStats,
    SequenceDelta,
    TokenLogprob,
)
from deltaserve.engine.lockstep import join
from deltaserve.engine.sequence import Sequence


def make_sequences(request: GenerationRequest, arrival_seconds: float, seq_ids: Iterator[int]) -> list[Sequence]:
    """The ``n`` sequences of a request, of an ensemble the leading row of each choice. The first one's prefill is what
    its siblings reuse by the prefix cache."""
    sampling = request.sampling
    stops = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops |= frozenset(request.eos_token_ids)
    sequences: list[Sequence] = []
    for index in range(request.n):
        token_ids = list(request.prompt_ids)
        rng = random.Random() if sampling.seed is None else random.Random(sampling.seed + index)
        rows = [
            Sequence(
                seq_id=seq_id,
                request_id=request.request_id,
                index=index,
                token_ids=token_ids,
                num_prompt_tokens=len(request.prompt_ids),
                sampling=sampling,
                binding=binding,
                versions=binding.versions,
                priority=(arrival_seconds, seq_id),
                arrival_seconds=arrival_seconds,
                stop_token_ids=stops,
                tenant=request.tenant,
                cache_salt=request.cache_salt,
                leader=sequences[0] if sequences else None,
                has_prompt_rows=index > 0,
                rng=rng,
            )
            for binding, seq_id in zip(request.bindings, seq_ids, strict=False)
        ]
        if request.ensemble is not None:
            join(rows, request.ensemble)
        sequences.append(rows[0])
    return sequences


@dataclass(slots=True, eq=False)
class LiveRequest:
    """Owned by the engine thread. ``deadline_seconds`` is on the engine's clock; ``labels`` are for metrics."""

    request: GenerationRequest
    sequences: list[Sequence]
    arrival_seconds: float
    deadline_seconds: float | None = None
    labels: tuple[str, ...] = ()
    is_started: bool = False
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    first_token_seconds: float | None = None
    itl_seconds: list[float] = field(default_factory=list)
    deltas: list[SequenceDelta] = field(default_factory=list)
    has_told_prompt: bool = False

    @property
    def is_finished(self) -> bool:
        return None not in [seq.finish_reason for seq in self.sequences]

    def accept(self, seq: Sequence, token_id: int, logprob: TokenLogprob | None, now: float) -> None:
        """A sampled token: append it, tell it, and end the sequence when it says so.

        A stop token is not part of ``token_ids`` of the delta, it is named by ``stop_token_id``.
        """
        seq.token_ids.append(token_id)
        if seq.last_token_seconds is not None:
            self.itl_seconds.append(now - seq.last_token_seconds)
        elif self.first_token_seconds is None:
            self.first_token_seconds = now
        seq.last_token_seconds = now
        if token_id in seq.stop_token_ids:
            seq.finish_reason = FinishReason.STOP
            self.deltas.append(SequenceDelta(seq.index, finish_reason=FinishReason.STOP, stop_token_id=token_id))
            return
        if len(seq.token_ids) - seq.num_prompt_tokens >= seq.sampling.max_tokens:
            seq.finish_reason = FinishReason.LENGTH
        logprobs = () if logprob is None else (logprob,)
        self.deltas.append(SequenceDelta(seq.index, (token_id,), logprobs, seq.finish_reason))

    def end(self, seq: Sequence, reason: FinishReason) -> None:
        """The sequence ends without a further token."""
        if seq.finish_reason is None:
            seq.finish_reason = reason
            self.deltas.append(SequenceDelta(seq.index, finish_reason=reason))

    @property
    def is_silent(self) -> bool:
        """Nothing is to be told yet: whoever asked wants the whole answer at once."""
        return not self.request.is_streamed and not self.is_finished

    def take_output(self) -> RequestOutput:
        """What has been collected since the last call."""
        prompt: tuple[TokenLogprob | None, ...] | None = None
        if not self.has_told_prompt and self.request.sampling.prompt_logprobs is not None:
            prompt = tuple(self.prompt_logprobs)
        self.has_told_prompt = True
        deltas = tuple(self.deltas) if self.request.is_streamed else tuple(_merged(self.deltas))
        self.deltas = []
        return RequestOutput(
            request_id=self.request.request_id,
            deltas=deltas,
            is_finished=self.is_finished,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_cached_tokens=self._num_cached_tokens,
            prompt_logprobs=prompt,
        )

    def stats(self, outcome: FinishReason, now: float) -> RequestStats:
        started = [seq.started_seconds for seq in self.sequences if seq.started_seconds is not None]
        return RequestStats(
            outcome=outcome,
            versions=self.request.versions,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_cached_tokens=self._num_cached_tokens,
            num_completion_tokens=sum(seq.num_completion_tokens for seq in self.sequences),
            queue_seconds=(min(started) if started else now) - self.arrival_seconds,
            adapter_wait_seconds=max(seq.adapter_wait_seconds for seq in self.sequences),
            ttft_seconds=None if self.first_token_seconds is None else self.first_token_seconds - self.arrival_seconds,
            itl_seconds=tuple(self.itl_seconds),
            e2e_seconds=now - self.arrival_seconds,
            is_ensemble=self.request.ensemble is not None,
        )

    @property
    def _num_cached_tokens(self) -> int:
        first = self.sequences[0]
        return first.num_cached_tokens if first.lockstep is None else first.lockstep.num_cached_tokens


def _merged(deltas: list[SequenceDelta]) -> Iterator[SequenceDelta]:
    """One delta for each sequence: all its tokens, and how it ended."""
    by_index: dict[int, list[SequenceDelta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    for index, own in by_index.items():
        token_ids = tuple(token_id for delta in own for token_id in delta.token_ids)
        logprobs = tuple(logprob for delta in own for logprob in delta.logprobs)
        yield SequenceDelta(index, token_ids, logprobs, own[-1].finish_reason, own[-1].stop_token_id)
