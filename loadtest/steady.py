"""Streams that never pause: the background against which something else is felt, and their gaps window by window.

Each stream sends its next long request when it has its answer. Their first requests are of different lengths, so that
they do not end in the same step; gaps in which one of them begins anew are left out. Otherwise the quiet value would be
that of the streams' own prefills, and nothing beside it would show.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

from loadtest.client import Answer, ask
from loadtest.figures import percentiles
from loadtest.target_choice import OpenTarget
from loadtest.workload import PlannedRequest, token_prompts

POLL_SECONDS = 0.02
FIRST_TOKEN_SECONDS = 300.0
NUM_PROMPTS = 1024
CUT = "cut at the end of the run"

Window = tuple[float, float]
"""From when to when, in seconds since the streams began."""


@dataclass(slots=True)
class SteadyStreams:
    """Times are seconds since ``began`` (monotonic). ``answers`` grow while the streams run and are settled after."""

    began: float
    answers: list[Answer] = field(default_factory=list)
    _gaps: list[tuple[float, float]] = field(default_factory=list)

    def now(self) -> float:
        return time.monotonic() - self.began

    def settle(self) -> None:
        """Reads what was received: once, when the streams have ended."""
        for answer in self.answers:
            answer.settle()
        renewals = [(a.sent, a.token_times[0]) for a in self.answers if a.token_times]
        self._gaps = [
            (at, gap)
            for answer in self.answers
            for at, gap in zip(answer.token_times[1:], answer.itl_seconds, strict=True)
            if not any(sent < at and at - gap < first for sent, first in renewals)
        ]

    def over(self, windows: Sequence[Window]) -> dict[str, Any]:
        """Figures of the gaps that ended in one of the windows; ``settle`` first.

        Gaps during which one of the streams itself began anew are left out: its prefill is no part of a steady stream.
        """
        gaps = [gap for at, gap in self._gaps if any(begin <= at < end for begin, end in windows)]
        seconds = sum(end - begin for begin, end in windows)
        return {
            "window_seconds": seconds,
            "tokens_per_second": len(gaps) / seconds,
            "latency": {"itl_seconds": percentiles(gaps)},
        }

    def failures(self) -> dict[str, int]:
        """Kinds of failure and how often; requests cut at the end of the run are none."""
        return dict(Counter(a.error[:80] for a in self.answers if a.error and a.error != CUT))


@asynccontextmanager
async def steady_streams(
    opened: OpenTarget, models: Sequence[str], *, prompt_tokens: int, max_tokens: int, seed: int
) -> AsyncIterator[SteadyStreams]:
    """One stream for each of ``models``, all past their first token; cut and settled at the end.

    Raises ``TimeoutError`` when a stream gets no first token in ``FIRST_TOKEN_SECONDS``.
    """
    found = SteadyStreams(time.monotonic())
    prompts = cycle(token_prompts(NUM_PROMPTS, prompt_tokens, opened.plain_tokens, seed))

    async def follow(number: int, model: str) -> None:
        length = max(2, max_tokens * (number + 1) // len(models))
        while True:
            answer = Answer(PlannedRequest(len(found.answers), found.now(), model, next(prompts), length))
            found.answers.append(answer)
            try:
                await ask(opened.session, opened.target, answer, found.began, True, settled=False)
            except asyncio.CancelledError:
                answer.error = CUT
                raise
            if answer.error is not None:
                await asyncio.sleep(1.0)  # a server that refuses is not asked again at once
            length = max_tokens

    tasks = [asyncio.create_task(follow(number, model)) for number, model in enumerate(models)]
    try:
        async with asyncio.timeout(FIRST_TOKEN_SECONDS):
            while len(found.answers) < len(models) or not all(a.raw or a.error for a in found.answers[: len(models)]):
                await asyncio.sleep(POLL_SECONDS)
        yield found
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        found.settle()
