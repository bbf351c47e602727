"""All sequences that one HTTP request asked for, submitted together and read as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from deltaserve.api.choice import Choice, ChoiceDelta
from deltaserve.api.services import GenerationEngine, OutputStream
from deltaserve.core import GenerationRequest, RequestOutput, TokenLogprob

Step = tuple["Prompt", list[ChoiceDelta]]
"""What a step of the engine added to one prompt's choices."""


@dataclass(slots=True, eq=False)
class Prompt:
    """One prompt: the engine's request for it, and the ``n`` choices it yields."""

    request: GenerationRequest
    choices: Sequence[Choice]
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprob | None, ...] | None = None
    stream: OutputStream | None = field(default=None, repr=False)

    @property
    def is_finished(self) -> bool:
        return None not in [choice.finish_reason for choice in self.choices]

    def take(self, output: RequestOutput) -> Step:
        """What to show of an output. When a stop string ends a sequence, the engine is told: it does not know text."""
        if output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            self.logprobs = output.prompt_logprobs
        shown = []
        for delta in output.deltas:
            addition = self.choices[delta.index].push(delta)
            if addition is not None:
                shown.append(addition)
                if addition.finish_reason is not None and delta.finish_reason is None:
                    _stream_of(self).stop(delta.index)
        return self, shown


class Generation:
    """Submitting is all or nothing; leaving early, by whatever way, aborts what still runs.

    ``async for prompt, deltas in generation``: what each step added, prompt by prompt, until every choice has ended.
    Raises the engine's typed errors. Whoever iterates must ``aclose`` at the end.
    """

    def __init__(self, engine: GenerationEngine, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self._first: asyncio.Future[Step] | None = None
        self._is_first_taken = False
        self._steps = self._run()
        try:
            for prompt in prompts:
                prompt.stream = engine.submit(prompt.request)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        for prompt in self.prompts:
            if prompt.stream is not None:
                prompt.stream.abort()

    async def wait_for_first(self, seconds: float) -> None:
        """Waits that long for the first output, so that an early failure still gets its own HTTP status."""
        self._first = asyncio.ensure_future(anext(self._steps))
        try:
            await asyncio.wait({self._first}, timeout=seconds)
            if self._first.done():
                self._first.result()
        except BaseException:
            await self.aclose()
            raise

    def divert(self, take: Callable[[Step], None], may_take: Callable[[], bool]) -> None:
        """From now on steps that come while the reader waits go to ``take`` within the engine's delivery, where
        ``may_take`` allows it; the last step and failures always go to the reader. Only one prompt is told so: the
        outputs of several are merged on their way."""
        if len(self.prompts) > 1:
            return
        prompt = self.prompts[0]
        stream = _stream_of(prompt)

        def sink(output: RequestOutput) -> bool:
            if not may_take():
                return False
            take(prompt.take(output))
            if prompt.is_finished:  # a stop string: the engine has not ended it yet, and the reader must hear
                stream.abort()
            return True

        stream.divert(sink)

    def __aiter__(self) -> Generation:
        return self

    def __anext__(self) -> Awaitable[Step]:
        """Hands on the inner awaitable: one coroutine less for each token."""
        if self._first is None or self._is_first_taken:
            return self._steps.__anext__()
        self._is_first_taken = True
        return self._first

    async def aclose(self) -> None:
        """Aborts what still runs; safe to call again."""
        self.abort()
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._steps.aclose()

    async def _run(self) -> AsyncGenerator[Step]:
        if len(self.prompts) == 1:  # nearly every request: without a queue and a generator between
            prompt = self.prompts[0]
            async for output in _stream_of(prompt):
                yield prompt.take(output)
                if prompt.is_finished:
                    return
            return
        async with aclosing(self._outputs()) as outputs:
            async for prompt, output in outputs:
                yield prompt.take(output)
                if all(each.is_finished for each in self.prompts):
                    return

    async def _outputs(self) -> AsyncGenerator[tuple[Prompt, RequestOutput]]:
        """Of all prompts, as they come."""
        queue: asyncio.Queue[tuple[Prompt, RequestOutput] | BaseException | None] = asyncio.Queue(maxsize=64)

        async def pump(prompt: Prompt) -> None:
            try:
                async for output in _stream_of(prompt):
                    await queue.put((prompt, output))
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.create_task(pump(prompt)) for prompt in self.prompts]
        try:
            open_streams = len(tasks)
            while open_streams:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    open_streams -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def usage(self) -> dict[str, object]:
        prompt_tokens = sum(len(prompt.request.prompt_ids) for prompt in self.prompts)
        completion_tokens = sum(choice.num_tokens for prompt in self.prompts for choice in prompt.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(prompt.num_cached_tokens for prompt in self.prompts)},
        }


def _stream_of(prompt: Prompt) -> OutputStream:
    if prompt.stream is None:
        raise RuntimeError("the prompt was not submitted")
    return prompt.stream
