"""The small bodies: tokenize, detokenize, alias, rollback."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from deltaserve.api.schemas.chat import MAX_MESSAGES, ChatMessage
from deltaserve.api.schemas.sampling import Strict, TokenId
from deltaserve.errors import InvalidRequest

MAX_IDS = 1 << 20


class TokenizeRequest(Strict):
    """Either ``prompt`` or ``messages``."""

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("send either prompt or messages", param="prompt")
        if self.messages is not None and self.add_special_tokens and "add_special_tokens" in self.model_fields_set:
            raise InvalidRequest("the template writes the special tokens of messages", param="add_special_tokens")
        if self.prompt is not None and "add_generation_prompt" in self.model_fields_set:
            raise InvalidRequest("add_generation_prompt goes with messages", param="add_generation_prompt")
        return self


class DetokenizeRequest(Strict):
    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_IDS)]
    skip_special_tokens: bool = False


class RollbackRequest(Strict):
    """``version``: a digest or a prefix of 8 or more digits; without it, the version before the current one."""

    version: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")] | None = None


class AliasRequest(Strict):
    """``target``: an adapter name, or ``name@version``."""

    target: Annotated[str, Field(min_length=1, max_length=256)]
