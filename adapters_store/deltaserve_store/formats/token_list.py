"""``tokens.json``: the tokens that an adapter adds, one of its files in the store.

    {"format": "deltaserve-tokens", "tokens": [{"id": 32000, "content": "<|tool|>", "is_special": true}, ...]}

The store keeps it in place of the tokenizer files of an upload; an upload may hold it itself. Fields: those of
``AddedToken``; flags that are left out are false.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deltaserve_store.added_tokens import AddedToken

FORMAT = "deltaserve-tokens"


def write_token_list(tokens: Sequence[AddedToken]) -> bytes:
    """The file; equal lists give equal bytes."""
    listed = [{key: value for key, value in asdict(token).items() if value is not False} for token in tokens]
    return json.dumps({"format": FORMAT, "tokens": listed}, sort_keys=True, indent=1).encode() + b"\n"


def listed_tokens(data: Mapping[str, Any]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """(id, fields as tokenizers name them) of every token of a file with the right ``format``."""
    listed = data.get("tokens") if data.get("format") == FORMAT else None
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict):
            yield entry.get("id"), {**entry, "special": entry.get("is_special", False)}
