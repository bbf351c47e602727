"""``POST /v1/chat/completions``."""

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
from deltaserve.api.logprobs import chat_logprobs
from deltaserve.api.schemas.chat import ChatRequest
from deltaserve.api.schemas.open_fields import open_fields
from deltaserve.api.services import Services, services_of
from deltaserve.api.target import Target
from deltaserve.api.wire_json import encode, quote
from deltaserve.errors import ContextLengthExceeded
from deltaserve.text import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(http: Request, caller: Caller = MAY_USE) -> Response:
    services = services_of(http)
    data = await read_json(http, services.config.max_body_bytes)
    fields = ChatRequest.model_validate(open_fields(data, ChatRequest.model_fields))
    target = target_of(services.engine, caller, fields)
    tokenizer = await tokenizer_of(services, target)
    prompt_ids = await render(tokenizer, target, fields)
    sampling = fields.sampling(
        max_tokens=fields.num_tokens or room_after(services, prompt_ids, target),
        logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )
    prompt = make_prompt(services, caller, target, tokenizer, fields, sampling, prompt_ids, 0)
    generation = Generation(services.engine, [prompt])
    envelope = Envelope("chatcmpl", "chat.completion", "chat.completion.chunk", target)
    return await respond(http, generation, fields, envelope, ChatFormat(tokenizer, fields))


async def render(tokenizer: Tokenizer, target: Target, fields: ChatRequest) -> list[int]:
    """Prompt ids through the adapter's registered template, else the base's own."""
    messages = [message.for_template() for message in fields.messages]
    arguments = (messages, target.chat_template, fields.add_generation_prompt, fields.template_variables())
    if sum(len(message["content"]) for message in messages) <= LONG_TEXT_CHARS:
        return tokenizer.render_chat(*arguments)
    return await asyncio.to_thread(tokenizer.render_chat, *arguments)


def room_after(services: Services, prompt_ids: Sequence[int], target: Target) -> int:
    """Tokens that the context leaves for the answer. Raises ContextLengthExceeded when it leaves none."""
    limit = services.engine.max_row_len(target.num_rows) - target.num_prefix_tokens
    if len(prompt_ids) >= limit:
        raise ContextLengthExceeded(
            f"the messages have {len(prompt_ids)} tokens and the context of this server is {limit} tokens, which must "
            "hold the answer too; shorten the messages",
            param="messages",
        )
    return limit - len(prompt_ids)


class ChatFormat:
    """Choices as ``/v1/chat/completions`` writes them."""

    def __init__(self, tokenizer: Tokenizer, fields: ChatRequest) -> None:
        self._tokenizer = tokenizer
        self._fields = fields

    def opening(self, prompts: Sequence[Prompt]) -> list[str]:
        """The role comes first, once for each choice."""
        first = {"role": "assistant", "content": ""}
        return [self._chunk(choice.index, first, (), None) for prompt in prompts for choice in prompt.choices]

    def started(self, prompt: Prompt) -> list[str]:
        return []

    def chunk(self, prompt: Prompt, delta: ChoiceDelta) -> list[str]:
        """Content and the end come in chunks of their own."""
        chunks = []
        if delta.text and not delta.tokens:  # once a token: written by hand
            content = f'{{"content":{quote(delta.text)}}}'
            chunks.append(f'{{"index":{delta.index},"delta":{content},"logprobs":null,"finish_reason":null}}')
        elif delta.text or delta.tokens:
            chunks.append(self._chunk(delta.index, {"content": delta.text}, delta.tokens, None))
        if delta.finish_reason is not None:
            chunks.append(self._chunk(delta.index, {}, (), delta.finish_reason))
        return chunks

    def choice(self, prompt: Prompt, index: int, full: FullChoice) -> dict[str, Any]:
        message = {"role": "assistant", "content": full.text, "refusal": None}
        choice = {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._tokenizer, full.tokens) if self._fields.logprobs else None,
            "finish_reason": full.finish_reason,
        }
        if self._fields.return_token_ids:
            choice["token_ids"] = [entry.token_id for entry in full.tokens]
            choice["prompt_token_ids"] = list(prompt.request.prompt_ids)
        return choice

    def _chunk(
        self, index: int, delta: dict[str, Any], entries: Sequence[TokenEntry], finish_reason: str | None
    ) -> str:
        has_logprobs = self._fields.logprobs and bool(entries)
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(self._tokenizer, entries) if has_logprobs else None,
            "finish_reason": finish_reason,
        }
        if self._fields.return_token_ids and entries:
            choice["token_ids"] = [entry.token_id for entry in entries]
        return encode(choice)
