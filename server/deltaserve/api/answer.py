"""What completions and chat completions share: from fields to a generation, and from a generation to a response."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deltaserve.api.choice import Choice, ChoiceDelta, TokenEntry
from deltaserve.api.generation import Generation, Prompt, Step
from deltaserve.api.keys import Caller
from deltaserve.api.schemas.sampling import GenerationFields
from deltaserve.api.services import Services
from deltaserve.api.streaming import DirectWriter, EventStream, finish_unless_gone
from deltaserve.api.target import Target
from deltaserve.api.wire_json import encode
from deltaserve.core import FinishReason, GenerationRequest, SamplingParams
from deltaserve.text import Tokenizer

FIRST_OUTPUT_SECONDS = 5.0
"""How long a stream's response waits for its first output, so that an early failure still gets its own status."""
LONG_TEXT_CHARS = 4096
"""Longer texts are encoded in a worker thread, so that they do not hold up the streams of others."""


@dataclass(slots=True)
class FullChoice:
    """Everything one choice became, for a response that is not streamed."""

    text: str = ""
    tokens: list[TokenEntry] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        self.finish_reason = delta.finish_reason or self.finish_reason


class Format(Protocol):
    """How one of the two routes writes its answer."""

    def opening(self, prompts: Sequence[Prompt]) -> list[str]:
        """JSON of the choices of chunks sent before anything was generated."""

    def started(self, prompt: Prompt) -> list[str]:
        """JSON of the choices of chunks sent once a prompt's first output is there."""

    def chunk(self, prompt: Prompt, delta: ChoiceDelta) -> list[str]:
        """JSON of the choices of the chunks that tell ``delta``, none if it has nothing to tell."""

    def choice(self, prompt: Prompt, index: int, full: FullChoice) -> dict[str, Any]:
        """A finished choice."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields around the choices; every chunk of a stream has the same."""

    prefix: str
    kind: str
    chunk_kind: str
    target: Target
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._fields(self.kind), "choices": choices, "usage": usage}

    @property
    def chunk_head(self) -> str:
        """The JSON of a chunk up to its choices: the same in all chunks of a stream, so it is written once."""
        return encode(self._fields(self.chunk_kind)).removesuffix("}") + ',"choices":['

    def _fields(self, kind: str) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.target.model,
            "system_fingerprint": self.target.fingerprint,
        }
        return {**fields, **self.target.told}


def make_prompt(
    services: Services,
    caller: Caller,
    target: Target,
    tokenizer: Tokenizer,
    fields: GenerationFields,
    sampling: SamplingParams,
    prompt_ids: Sequence[int],
    first_index: int,
) -> Prompt:
    """The engine's request for one prompt, and its choices numbered from ``first_index``."""
    request = GenerationRequest(
        request_id=f"gen-{secrets.token_hex(12)}",
        prompt_ids=tuple(prompt_ids),
        sampling=sampling,
        binding=target.binding_for(prompt_ids),
        ensemble=target.ensemble_for(prompt_ids),
        n=fields.n,
        eos_token_ids=tuple(dict.fromkeys((*tokenizer.eos_token_ids, *target.stop_token_ids))),
        tenant=caller.tenant,
        cache_salt=fields.cache_salt or "",
        deadline_seconds=services.config.request_timeout_seconds,
        is_streamed=fields.stream or bool(fields.stop),  # stop strings are looked for as tokens come
    )
    choices = [
        Choice(
            first_index + number,
            tokenizer,
            prompt_ids=prompt_ids,
            stops=fields.stop,
            include_stop=fields.include_stop_str_in_output,
            min_tokens=fields.min_tokens,
            skip_special_tokens=fields.skip_special_tokens,
            keeps_tokens=fields.return_token_ids or sampling.logprobs is not None,
        )
        for number in range(fields.n)
    ]
    return Prompt(request, choices)


async def tokenizer_of(services: Services, target: Target) -> Tokenizer:
    """The base's tokenizer, with the tokens that the target's adapters add."""
    if services.tokenizer.has_added(target.added_tokens):
        return services.tokenizer.with_added(target.added_tokens)
    return await asyncio.to_thread(services.tokenizer.with_added, target.added_tokens)


async def encode_text(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    if len(text) <= LONG_TEXT_CHARS:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)


async def respond(
    http: Request, generation: Generation, fields: GenerationFields, envelope: Envelope, form: Format
) -> Response:
    """A stream or one JSON object. The client's leaving aborts the generation."""
    log_fields = http.scope["state"].setdefault("log_fields", {})
    log_fields |= {**envelope.target.log_fields, "stream": fields.stream}
    if fields.stream:
        chunks = Chunks(generation, envelope, form, include_usage=fields.include_usage, log_fields=log_fields)
        return EventStream(chunks, envelope.target.headers)
    body = await finish_unless_gone(_collect(generation, envelope, form), http)
    log_fields |= {"usage": generation.usage()}
    return JSONResponse(body, headers=envelope.target.headers)


async def _collect(generation: Generation, envelope: Envelope, form: Format) -> dict[str, Any]:
    full = {choice.index: FullChoice() for prompt in generation.prompts for choice in prompt.choices}
    async with aclosing(generation):
        async for _, deltas in generation:
            for delta in deltas:
                full[delta.index].add(delta)
    choices = [
        form.choice(prompt, choice.index, full[choice.index])
        for prompt in generation.prompts
        for choice in prompt.choices
    ]
    return envelope.whole(choices, generation.usage())


class Chunks:
    """The chunks of a stream. With ``include_usage`` each carries ``usage``: null, and a number in one last chunk."""

    def __init__(
        self,
        generation: Generation,
        envelope: Envelope,
        form: Format,
        *,
        include_usage: bool,
        log_fields: dict[str, Any],
    ) -> None:
        self._generation = generation
        self._form = form
        self._head = f"data: {envelope.chunk_head}"
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._include_usage = include_usage
        self._log_fields = log_fields
        self._unstarted = list(generation.prompts)

    async def wait_for_first(self) -> None:
        await self._generation.wait_for_first(FIRST_OUTPUT_SECONDS)

    def opening(self) -> bytes:
        return self._write(self._form.opening(self._generation.prompts))

    def write_to(self, writer: DirectWriter) -> None:
        self._generation.divert(lambda step: writer.write(self.tell(step)), writer.is_ready)

    def __aiter__(self) -> AsyncIterator[Step]:
        return self._generation

    def tell(self, step: Step) -> bytes:
        prompt, deltas = step
        choices = self._start(prompt) if self._unstarted else []
        for delta in deltas:
            choices += self._form.chunk(prompt, delta)
        return self._write(choices)

    @property
    def is_over(self) -> bool:
        return all(prompt.is_finished for prompt in self._generation.prompts)

    def closing(self) -> bytes:
        if not self._include_usage:
            return b""
        return f'{self._head}],"usage":{encode(self._generation.usage())}}}\n\n'.encode()

    async def aclose(self) -> None:
        self._log_fields["usage"] = self._generation.usage()
        await self._generation.aclose()

    def _start(self, prompt: Prompt) -> list[str]:
        if prompt not in self._unstarted:
            return []
        self._unstarted.remove(prompt)
        return self._form.started(prompt)

    def _write(self, choices: list[str]) -> bytes:
        """One event for each choice."""
        return "".join([f"{self._head}{choice}{self._tail}" for choice in choices]).encode()
