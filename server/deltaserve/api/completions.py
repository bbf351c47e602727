"""``POST /v1/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from deltaserve.api.answer import LONG_TEXT_CHARS, Envelope, FullChoice, make_prompt, respond, tokenizer_of
from deltaserve.api.auth import MAY_USE, Caller
from deltaserve.api.body import read_json
from deltaserve.api.choice import ChoiceDelta, TokenEntry
from deltaserve.api.ensembles import target_of
from deltaserve.api.generation import Generation, Prompt
from deltaserve.api.logprobs import completion_logprobs, prompt_entries
from deltaserve.api.schemas.completion import CompletionRequest
from deltaserve.api.schemas.open_fields import open_fields
from deltaserve.api.services import services_of
from deltaserve.api.wire_json import encode, quote
from deltaserve.text import Tokenizer

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(http: Request, caller: Caller = MAY_USE) -> Response:
    services = services_of(http)
    data = await read_json(http, services.config.max_body_bytes)
    fields = CompletionRequest.model_validate(open_fields(data, CompletionRequest.model_fields))
    target = target_of(services.engine, caller, fields)
    tokenizer = await tokenizer_of(services, target)
    sampling = fields.sampling(
        max_tokens=fields.num_tokens,
        logprobs=fields.logprobs,
        prompt_logprobs=fields.logprobs if fields.echo else None,
    )
    prompts = [
        make_prompt(services, caller, target, tokenizer, fields, sampling, ids, number * fields.n)
        for number, ids in enumerate(await _encode(tokenizer, fields))
    ]
    generation = Generation(services.engine, prompts)
    envelope = Envelope("cmpl", "text_completion", "text_completion", target)
    return await respond(http, generation, fields, envelope, CompletionFormat(tokenizer, fields))


async def _encode(tokenizer: Tokenizer, fields: CompletionRequest) -> list[Sequence[int]]:
    """Control tokens written in a prompt count as such: a prompt is the caller's own, as token ids would be."""

    def encode() -> list[Sequence[int]]:
        return [tokenizer.encode(p, fields.add_special_tokens) if isinstance(p, str) else p for p in fields.prompt]

    if sum(len(prompt) for prompt in fields.prompt if isinstance(prompt, str)) <= LONG_TEXT_CHARS:
        return encode()
    return await asyncio.to_thread(encode)


class CompletionFormat:
    """Choices as ``/v1/completions`` writes them; with ``echo`` the prompt's text and scores come first."""

    def __init__(self, tokenizer: Tokenizer, fields: CompletionRequest) -> None:
        self._tokenizer = tokenizer
        self._fields = fields
        self._tells_tokens = fields.logprobs is not None or fields.return_token_ids
        self._num_echoed_chars: dict[int, int] = {}

    def opening(self, prompts: Sequence[Prompt]) -> list[str]:
        return []

    def started(self, prompt: Prompt) -> list[str]:
        if not self._fields.echo:
            return []
        text, entries = self._echo(prompt)
        self._num_echoed_chars[id(prompt)] = len(text)
        return [encode(self._write(choice.index, text, entries, 0, None)) for choice in prompt.choices]

    def chunk(self, prompt: Prompt, delta: ChoiceDelta) -> list[str]:
        if not (delta.text or delta.finish_reason or delta.tokens):
            return []
        if not self._tells_tokens:  # once a token: written by hand
            text, reason = quote(delta.text), quote(delta.finish_reason)
            return [f'{{"index":{delta.index},"text":{text},"logprobs":null,"finish_reason":{reason}}}']
        offset = self._num_echoed_chars.get(id(prompt), 0)
        return [encode(self._write(delta.index, delta.text, delta.tokens, offset, delta.finish_reason))]

    def choice(self, prompt: Prompt, index: int, full: FullChoice) -> dict[str, Any]:
        echo, entries = self._echo(prompt) if self._fields.echo else ("", [])
        shifted = [TokenEntry(entry.token_id, entry.logprob, len(echo) + entry.text_offset) for entry in full.tokens]
        written = self._write(index, echo + full.text, [*entries, *shifted], 0, full.finish_reason)
        if self._fields.return_token_ids:
            written["token_ids"] = [entry.token_id for entry in full.tokens]
            written["prompt_token_ids"] = list(prompt.request.prompt_ids)
        return written

    def _write(
        self,
        index: int,
        text: str,
        entries: Sequence[TokenEntry],
        offset: int,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        top = self._fields.logprobs
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if top is None else completion_logprobs(self._tokenizer, entries, offset, top),
            "finish_reason": finish_reason,
        }
        if self._fields.return_token_ids:
            choice["token_ids"] = [entry.token_id for entry in entries]
        return choice

    def _echo(self, prompt: Prompt) -> tuple[str, list[TokenEntry]]:
        ids, skip = prompt.request.prompt_ids, self._fields.skip_special_tokens
        entries = prompt_entries(self._tokenizer, ids, prompt.logprobs, skip_special_tokens=skip)
        return self._tokenizer.decode(ids, skip_special_tokens=skip), entries
