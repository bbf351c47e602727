"""Chat messages to token ids, with control tokens written by the template alone.

A user who writes ``<|im_end|>`` means these ten characters. So every control token inside a message is fenced with two
private-use characters before the template runs, and whatever stands between fences afterwards is encoded as plain
text. A chat without such text is encoded exactly as ``apply_chat_template`` would.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from deltaserve.errors import InvalidRequest

_PRIVATE_USE = range(0xE000, 0xF8FF)

Message = Mapping[str, str]
"""``role``, ``content`` and optionally ``name``; content is one string."""


class _Encoder(Protocol):
    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...


class ChatRenderer:
    """Renders with transformers' sandboxed Jinja environment.

    ``base_template`` is the base's own template; ``templates`` are those the operator registered by name.
    """

    def __init__(
        self,
        hf_tokenizer: Any,
        encoder: _Encoder,
        control_tokens: Mapping[str, int],
        ordinary_tokens: Mapping[str, int],
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self._hf = hf_tokenizer
        self._encoder = encoder
        self._control = dict(control_tokens)
        self._ordinary = dict(ordinary_tokens)
        self.templates = dict(templates or {})
        template = getattr(hf_tokenizer, "chat_template", None)
        self.base_template: str | None = template.get("default") if isinstance(template, dict) else template

    def template_text(self, name: str | None) -> str:
        """Template registered as ``name``, or the base's own for None. Raises InvalidRequest when there is none."""
        if name is not None:
            if name not in self.templates:
                raise InvalidRequest(
                    f"chat template {name!r} is not registered on this server; serve with --chat-template {name}=FILE",
                    param="model",
                    code="unknown_chat_template",
                )
            return self.templates[name]
        if self.base_template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or register a template with "
                "--chat-template NAME=FILE and name it in the adapter's manifest",
                param="messages",
                code="no_chat_template",
            )
        return self.base_template

    def render_ids(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Prompt ids of a chat; ``template`` is the name of a registered template."""
        text = self.template_text(template)
        control = self._control_tokens_of(text)
        opening, closing = _unused_characters(messages)
        fenced = [_fence(message, control, opening, closing) for message in messages]
        rendered = self._render(fenced, text, add_generation_prompt, dict(variables or {}))
        ids: list[int] = []
        for piece, is_plain in _pieces(rendered, control, opening, closing):
            ids += self._encode_plain(piece, control) if is_plain else self._encode_after(piece, is_first=not ids)
        return ids

    def _control_tokens_of(self, template: str) -> dict[str, int]:
        """All special tokens, and the ordinary added tokens that this template writes."""
        return self._control | {text: i for text, i in self._ordinary.items() if text in template}

    def _render(
        self, messages: list[dict[str, str]], template: str, add_generation_prompt: bool, variables: dict[str, Any]
    ) -> str:
        try:
            return self._hf.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refused these messages: {error}", param="messages"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidRequest(
                f"the model's chat template cannot render these messages ({type(error).__name__})", param="messages"
            ) from error

    def _encode_plain(self, piece: str, control: Mapping[str, int]) -> list[int]:
        """Ids of a control token's text, none of them a control token."""
        for cuts in ((1,), tuple(range(1, len(piece)))):
            starts = (0, *cuts)
            parts = [piece[start:stop] for start, stop in zip(starts, (*cuts, len(piece)), strict=True)]
            ids = [i for part in parts for i in self._encode_after(part, is_first=False)]
            if not set(ids) & set(control.values()):
                return ids
        raise InvalidRequest(
            "a message contains a control token of this model that cannot be written as plain text; remove it",
            param="messages",
        )

    def _encode_after(self, piece: str, *, is_first: bool) -> list[int]:
        """Ids of text in the middle of a chat: encoded behind a newline, so that no start-of-text space is added."""
        if is_first:
            return self._encoder.encode(piece, add_special_tokens=False)
        newline = self._encoder.encode("\n", add_special_tokens=False)
        ids = self._encoder.encode("\n" + piece, add_special_tokens=False)
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
        return self._encoder.encode(piece, add_special_tokens=False)


def _pattern(control: Mapping[str, int]) -> re.Pattern[str]:
    longest_first = sorted(control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _fence(message: Message, control: Mapping[str, int], opening: str, closing: str) -> dict[str, str]:
    pattern = _pattern(control)
    return {
        key: value if key == "role" else pattern.sub(lambda match: f"{opening}{match[0]}{closing}", value)
        for key, value in message.items()
    }


def _pieces(rendered: str, control: Mapping[str, int], opening: str, closing: str) -> Iterator[tuple[str, bool]]:
    """``(text, is_plain)`` of the rendered chat. A fence that the template tore from its token still separates."""
    fenced = re.compile(f"{opening}({_pattern(control).pattern}){closing}|[{opening}{closing}]")
    for position, piece in enumerate(fenced.split(rendered)):
        if piece:
            yield piece, position % 2 == 1


def _unused_characters(messages: Sequence[Message]) -> tuple[str, str]:
    """Two private-use characters that no message contains, so that a fence cannot be forged and no text is lost."""
    used = {character for message in messages for value in message.values() for character in value}
    free = list(islice((chr(code) for code in _PRIVATE_USE if chr(code) not in used), 2))
    if len(free) < 2:
        raise InvalidRequest("messages use every private-use character of Unicode; remove some", param="messages")
    return free[0], free[1]
