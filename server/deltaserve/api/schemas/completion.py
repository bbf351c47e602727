"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from deltaserve.api.schemas.sampling import MAX_LOGPROBS, GenerationFields
from deltaserve.errors import InvalidRequest

MAX_PROMPTS = 128
DEFAULT_MAX_TOKENS = 16
"""OpenAI's default."""

Prompt = str | tuple[int, ...]


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """str, [str], [int] or [[int]] -> one entry per prompt."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    if _is_ids(value):
        return (tuple(value),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts are allowed in one request, found {len(value)}")
    if all(isinstance(entry, str) for entry in value):
        return tuple(value)
    if all(isinstance(entry, list) and _is_ids(entry) for entry in value):
        return tuple(tuple(entry) for entry in value)
    raise ValueError(
        "must hold only strings, only token ids, or only non-empty lists of token ids (whole numbers >= 0)"
    )


def _is_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(entry) is int and 0 <= entry < 1 << 31 for entry in value)


class CompletionRequest(GenerationFields):
    """``max_tokens`` 0 is allowed with ``echo``: only the prompt is scored."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts), Field(strict=False)]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _zero_only_with_echo(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens must be at least 1 (0 only with echo)", param="max_tokens")
        return self

    @property
    def num_tokens(self) -> int:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
