"""All sequences that one HTTP request asked for, submitted together and read as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from deltaserve.api.choice import Choice, ChoiceDelta
from deltaserve.api.services import GenerationEngine, OutputStream
from deltaserve.core import GenerationRequest, RequestOutput, SequenceDelta, TokenLogprob


@dataclass(slots=True)
class Prompt:
    """One prompt: the engine's request for it, and the ``n`` choices it yields."""

    request: GenerationRequest
    choices: Sequence[Choice]
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprob | None, ...] | None = None
    stream: OutputStream | None = field(default=None, repr=False)

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)


class Generation:
    """Submitting is all or nothing; leaving early, by whatever way, aborts what still runs."""

    def __init__(self, engine: GenerationEngine, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self._first: asyncio.Future[tuple[Prompt, list[ChoiceDelta]]] | None = None
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

    async def deltas(self) -> AsyncIterator[tuple[Prompt, list[ChoiceDelta]]]:
        """What each step added, prompt by prompt, until every choice has ended. Raises the engine's typed errors."""
        try:
            if self._first is not None:
                yield await self._first
            async for step in self._steps:
                yield step
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Aborts what still runs; safe to call again."""
        self.abort()
        if self._first is not None and not self._first.done():
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
        await self._steps.aclose()

    async def _run(self) -> AsyncGenerator[tuple[Prompt, list[ChoiceDelta]]]:
        async with aclosing(self._outputs()) as outputs:
            async for prompt, output in outputs:
                prompt.num_cached_tokens = max(prompt.num_cached_tokens, output.num_cached_tokens)
                if output.prompt_logprobs is not None:
                    prompt.logprobs = output.prompt_logprobs
                yield prompt, [shown for delta in output.deltas if (shown := _push(prompt, delta)) is not None]
                if all(each.is_finished for each in self.prompts):
                    return

    async def _outputs(self) -> AsyncGenerator[tuple[Prompt, RequestOutput]]:
        if len(self.prompts) == 1:
            prompt = self.prompts[0]
            async for output in _stream_of(prompt):
                yield prompt, output
            return
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


def _push(prompt: Prompt, delta: SequenceDelta) -> ChoiceDelta | None:
    """What to show of a delta. When a stop string ends it here, the engine is told, for it does not know text."""
    shown = prompt.choices[delta.index].push(delta)
    if shown is not None and shown.finish_reason is not None and delta.finish_reason is None:
        _stream_of(prompt).stop(delta.index)
    return shown


def _stream_of(prompt: Prompt) -> OutputStream:
    if prompt.stream is None:
        raise RuntimeError("the prompt was not submitted")
    return prompt.stream
