"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltaserve.api.choice import TokenEntry
from deltaserve.core import TokenLogprob
from deltaserve.text import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def finite(logprob: float) -> float:
    return max(logprob, LOWEST) if logprob == logprob else LOWEST  # NaN is the only value unequal to itself


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenEntry], offset: int, top: int) -> dict[str, Any]:
    """``offset``: characters of the answer before the completion (the echoed prompt). ``top`` 0: no alternatives."""
    return {
        "tokens": [tokenizer.token_text(entry.token_id) for entry in entries],
        "token_logprobs": [None if entry.logprob is None else finite(entry.logprob.logprob) for entry in entries],
        "top_logprobs": [_top(tokenizer, entry.logprob) for entry in entries] if top else None,
        "text_offset": [offset + entry.text_offset for entry in entries],
    }


def prompt_entries(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    logprobs: Sequence[TokenLogprob | None] | None,
    *,
    skip_special_tokens: bool,
) -> list[TokenEntry]:
    """The echoed prompt's tokens; the first has no log probability."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens)
    entries = []
    for token_id, logprob in zip(ids, logprobs or (None,) * len(ids), strict=True):
        entries.append(TokenEntry(token_id, logprob, detokenizer.num_chars))
        detokenizer.push((token_id,))
    return entries


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenEntry]) -> dict[str, Any]:
    """``bytes`` are exact also where a token is a part of a character."""
    content = []
    for entry in entries:
        if entry.logprob is not None:
            top = [_chat_token(tokenizer, token_id, value) for token_id, value in entry.logprob.top]
            content.append(_chat_token(tokenizer, entry.token_id, entry.logprob.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _top(tokenizer: Tokenizer, logprob: TokenLogprob | None) -> dict[str, float] | None:
    """The likeliest wins where two tokens have one text."""
    if logprob is None:
        return None
    shown: dict[str, float] = {}
    for token_id, value in logprob.top:
        shown.setdefault(tokenizer.token_text(token_id), finite(value))
    return shown
