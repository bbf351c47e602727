"""Tokens that an adapter brings beyond those of the base's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ADDED_TOKENS = 4096
"""Of one adapter."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """``content`` in a text is the token ``id``. Flags as in Hugging Face's tokenizers: whether blanks on its left or
    right belong to it, whether it is found only as a whole word, whether text is normalised before it is looked for,
    and whether it is a control token, which decoding leaves out and untrusted text cannot write. ``is_end``: an answer
    ends with it."""

    id: int
    content: str
    is_special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    is_end: bool = False
