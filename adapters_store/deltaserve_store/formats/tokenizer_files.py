"""Tokens that an upload's tokenizer files add to the base's.

``tokenizer.json`` lists them with their ids (``added_tokens``); so do ``tokenizer_config.json`` of transformers 4
(``added_tokens_decoder``), ``added_tokens.json``, which has nothing but contents and ids, and our own ``tokens.json``.
Ids follow the base's without a gap, as ``add_tokens`` gives them. An added token that the config calls ``eos_token``
ends answers. Nothing else is read from these files.
Source: transformers 4.57 and 5.24, tokenizers 0.22.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaserve_store.added_tokens import MAX_ADDED_TOKENS, AddedToken
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.file_names import ADDED_TOKENS, TOKEN_LIST, TOKENIZER, TOKENIZER_CONFIG, cap_of
from deltaserve_store.findings import Findings
from deltaserve_store.formats.json_file import MAX_NODES, read_json_object
from deltaserve_store.formats.token_list import check_token_list, listed_tokens, write_token_list
from deltaserve_store.spec import BaseSpec

MAX_TOKEN_CHARS = 256
MAX_TOKENIZER_NODES = 8 * MAX_NODES
"""A vocabulary of some hundred thousand tokens, and three values for each merge."""

_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized", "is_end")


def read_added_tokens(folder: Path, names: set[str], base: BaseSpec, findings: Findings) -> tuple[AddedToken, ...]:
    """Tokens with ids beyond the base's tokenizer, by id; the files must agree. Damage is added to ``findings``."""
    first = base.num_tokens or base.vocab_size
    found: dict[int, AddedToken] = {}
    before = len(findings.reasons)
    # The one that tells most comes first: what later ones do not say, they do not contradict.
    for name in (TOKEN_LIST, TOKENIZER, TOKENIZER_CONFIG, ADDED_TOKENS):
        if name not in names:
            continue
        try:
            nodes = MAX_TOKENIZER_NODES if name == TOKENIZER else MAX_NODES
            data = read_json_object(folder / name, max_bytes=cap_of(name), max_nodes=nodes)
        except AdapterInvalid as error:
            findings.extend(error)
            continue
        if name == TOKEN_LIST:
            check_token_list(data, first, findings)
        for token in _tokens_of(name, data, first, findings):
            known = found.setdefault(token.id, token)
            if known.content != token.content:
                findings.add(
                    "invalid_value",
                    f"{name}:{token.id}",
                    f"{token.content[:80]!r}; another file says {known.content[:80]!r}",
                    "one text for a token",
                )
        if name == TOKENIZER_CONFIG:
            end = _text_of(data.get("eos_token"))
            found = {i: replace(token, is_end=token.is_end or token.content == end) for i, token in found.items()}
    tokens = tuple(found[index] for index in sorted(found))
    if len(findings.reasons) == before:
        _check_together(tokens, first, findings)
    return tokens


def _tokens_of(name: str, data: Mapping[str, Any], first: int, findings: Findings) -> Iterator[AddedToken]:
    for index, entry in _entries(name, data):
        where = f"{name}:{index}"
        content = entry.get("content")
        if type(index) is not int or index < first:
            continue  # the base's own tokens, which its own tokenizer speaks for
        if not isinstance(content, str) or not 0 < len(content) <= MAX_TOKEN_CHARS or not content.strip():
            findings.add("invalid_value", where, repr(content)[:80], f"a text of 1 to {MAX_TOKEN_CHARS} characters")
        elif any(type(entry.get(flag, False)) is not bool for flag in _FLAGS):
            findings.add("invalid_value", where, "a flag that is neither true nor false", "true or false")
        else:
            special = entry.get("special", False)
            yield AddedToken(
                index,
                content,
                is_special=special,
                lstrip=entry.get("lstrip", False),
                rstrip=entry.get("rstrip", False),
                single_word=entry.get("single_word", False),
                normalized=entry.get("normalized", False),
                is_end=entry.get("is_end", False),
            )


def _entries(name: str, data: Mapping[str, Any]) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """(id, fields) of every token that the file lists; what is no such list says nothing."""
    if name == TOKEN_LIST:
        yield from listed_tokens(data)
    elif name == TOKENIZER:
        listed = data.get("added_tokens")
        for entry in listed if isinstance(listed, list) else ():
            if isinstance(entry, dict):
                yield entry.get("id"), entry
    elif name == TOKENIZER_CONFIG:
        decoder = data.get("added_tokens_decoder")
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            if key.isascii() and key.isdecimal() and len(key) < 12 and isinstance(entry, dict):
                yield int(key), entry
    else:
        for content, index in data.items():
            yield index, {"content": content}


def _text_of(token: Any) -> str | None:
    """A special token in ``tokenizer_config.json``: its text, or an object with that and flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _check_together(tokens: tuple[AddedToken, ...], first: int, findings: Findings) -> None:
    if len(tokens) > MAX_ADDED_TOKENS:
        findings.add("added_tokens", "tokenizer", f"{len(tokens)} added tokens", f"at most {MAX_ADDED_TOKENS}")
        return
    for place, token in enumerate(tokens):
        if token.id != first + place:
            found = f"token id {token.id}"
            findings.add(
                "added_tokens", f"tokenizer:{token.content[:80]}", found, f"{first + place}: ids without a gap"
            )
            return
    # What stands for these files in the store is read again with every start: it must be one that can be.
    if (size := len(write_token_list(tokens))) > (limit := cap_of(TOKEN_LIST)):
        found = f"{len(tokens)} tokens, a list of {size} bytes"
        findings.add("added_tokens", "tokenizer", found, f"at most {limit} bytes: fewer or shorter tokens")
    contents: dict[str, int] = {}
    for token in tokens:
        if contents.setdefault(token.content, token.id) != token.id:
            found = f"token {token.id} with the text of token {contents[token.content]}"
            findings.add(
                "duplicate_index", f"tokenizer:{token.content[:80]}", found, "a text of its own for each token"
            )
