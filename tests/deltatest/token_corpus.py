"""Uploads whose added tokens do not fit, on the base of ``vocabulary_corpus``: 90 tokens, matrices of 100 rows, and a
head with a bias."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltatest.adapter_corpus import BadAdapter, write_file
from deltatest.vocabulary_corpus import VOCABULARY_GOOD, H

NUM_KNOWN, NUM_ROWS = 90, 100


def name_tokens(texts: list[str]) -> Callable[[Path], None]:
    """``tokens.json`` with these texts, from the first id on that the base does not know."""
    listed = [{"id": NUM_KNOWN + i, "content": text} for i, text in enumerate(texts)]
    return write_file("tokens.json", json.dumps({"format": "deltaserve-tokens", "tokens": listed}).encode())


def _name_long_tokens(count: int) -> Callable[[Path], None]:
    """The longest texts that a token may have, in a file that may be as large."""
    listed = [{"id": NUM_KNOWN + i, "content": f"{i:04}".ljust(256, "x")} for i in range(count)]
    return write_file("tokenizer.json", json.dumps({"added_tokens": listed}).encode())


def _case(kind: str, name: str, spoil: Any, *reasons: tuple[str, str]) -> BadAdapter:
    return BadAdapter(name, kind, spoil, reasons, good=VOCABULARY_GOOD[kind])


TOKEN_CORPUS: tuple[BadAdapter, ...] = (
    _case(
        "rows",
        "a token more than the head's bias has numbers",
        name_tokens([f"<{i}>" for i in range(NUM_ROWS - NUM_KNOWN + 1)]),
        ("added_tokens", H),
    ),
    _case(
        "apart", "forty tokens and a head with a bias", name_tokens([f"<{i}>" for i in range(40)]), ("added_tokens", H)
    ),
    _case(
        "rows",
        "a list longer than the store's own",
        _name_long_tokens(4096),
        ("added_tokens", "tokenizer"),
        ("added_tokens", H),
    ),
)
