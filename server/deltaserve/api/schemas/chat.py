"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from deltaserve.api.schemas.sampling import MAX_LOGPROBS, MAX_TOKENS, GenerationFields, Strict
from deltaserve.errors import InvalidRequest

MAX_MESSAGES = 2048
MAX_PARTS = 256
_NEUTRAL = {"refusal", "audio", "function_call", "tool_calls", "annotations", "reasoning_content", "reasoning"}
"""Keys of a message that the SDK sends back empty when an earlier answer is returned as history."""


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _plain_text(content: Any) -> Any:
    """A list of text parts is one text. Images and other parts are refused by their type."""
    if not isinstance(content, list):
        return content
    if len(content) > MAX_PARTS:
        raise ValueError(f"at most {MAX_PARTS} parts are allowed, found {len(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError("only parts {'type': 'text', 'text': ...} are supported")
    return "".join(TextPart.model_validate(part).text for part in content)


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_plain_text)]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        return {key: value for key, value in message.items() if not (key in _NEUTRAL and value in (None, []))}

    def for_template(self) -> dict[str, str]:
        """``developer`` is the newer word for ``system``; templates know only the older one."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({"name": self.name} if self.name else {})


TemplateValue = bool | int | Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class ChatRequest(GenerationFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: Annotated[dict[str, TemplateValue], Field(max_length=16)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _limits_agree(self) -> ChatRequest:
        if self.max_tokens == 0:
            raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                f"max_tokens {self.max_tokens} and max_completion_tokens {self.max_completion_tokens} differ; send one",
                param="max_completion_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @property
    def num_tokens(self) -> int | None:
        """None: as many as the context leaves."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    def template_variables(self) -> dict[str, bool | int | str]:
        """Raises InvalidRequest for a name that the renderer itself uses."""
        reserved = {"messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt"}
        bad = [
            name
            for name in self.chat_template_kwargs
            if not name.isidentifier()
            or name in reserved
            or name.startswith(("_", "return_", "continue_", "sanitize_"))
        ]
        if bad or any(name in _RENDERER_OPTIONS for name in self.chat_template_kwargs):
            raise InvalidRequest(
                "chat_template_kwargs holds a name that no template variable may have", param="chat_template_kwargs"
            )
        return dict(self.chat_template_kwargs)


_RENDERER_OPTIONS = {"conversation", "padding", "truncation", "max_length", "tokenizer_kwargs", "processor_kwargs"}
"""Arguments of transformers' ``apply_chat_template`` that are not template variables."""
