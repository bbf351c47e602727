"""``tokens.json``: the tokens that an adapter adds, one of its files in the store.

    {"format": "deltaserve-tokens", "tokens": [{"id": 32000, "content": "<|tool|>", "is_special": true}, ...]}

The store keeps it in place of the tokenizer files of an upload; an upload may hold it itself. Fields: those of
``AddedToken``; flags that are left out are false.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from deltaserve_store.added_tokens import AddedToken
from deltaserve_store.file_names import TOKEN_LIST
from deltaserve_store.findings import Findings

FORMAT = "deltaserve-tokens"


def write_token_list(tokens: Sequence[AddedToken]) -> bytes:
    """The file; equal lists give equal bytes. ``read_added_tokens`` refuses lists that make it larger than its cap."""
    listed = [{key: value for key, value in asdict(token).items() if value is not False} for token in tokens]
    return json.dumps({"format": FORMAT, "tokens": listed}, sort_keys=True, indent=1).encode() + b"\n"


def listed_tokens(data: Mapping[str, Any]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """(id, fields as tokenizers name them) of every token of a file with the right ``format``."""
    listed = data.get("tokens") if data.get("format") == FORMAT else None
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict):
            yield entry.get("id"), {**entry, "special": entry.get("is_special", False)}


def check_token_list(data: Mapping[str, Any], first: int, findings: Findings) -> None:
    """The file is ours, so nothing in it is passed over: all of its fields are known, and every token has an id from
    ``first`` on."""
    if data.get("format") != FORMAT:
        findings.add("invalid_value", f"{TOKEN_LIST}:format", data.get("format"), FORMAT)
    _check_keys(data, ("format", "tokens"), TOKEN_LIST, findings)
    listed = data.get("tokens")
    if not isinstance(listed, list) or not listed:
        findings.add("invalid_value", f"{TOKEN_LIST}:tokens", listed, "a list of one token or more")
        return
    known = [field.name for field in fields(AddedToken)]
    for place, entry in enumerate(listed):
        where = f"{TOKEN_LIST}:tokens[{place}]"
        if not isinstance(entry, dict):
            findings.add("invalid_value", where, entry, "an object with id and content")
            continue
        _check_keys(entry, known, where, findings)
        if type(entry.get("id")) is not int or entry["id"] < first:
            findings.add("invalid_value", f"{where}.id", entry.get("id"), f"a token id of at least {first}")


def _check_keys(data: Mapping[str, Any], known: Sequence[str], where: str, findings: Findings) -> None:
    for key in data:
        if key not in known:
            findings.add("unknown_field", f"{where}:{key}", data[key], f"one of {', '.join(known)}")
