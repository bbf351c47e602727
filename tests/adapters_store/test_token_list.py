"""The list of added tokens that the store writes is one that it reads; longer ones are refused where they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deltaserve.admission.added_tokens import with_token_list
from deltaserve_store.added_tokens import AddedToken
from deltaserve_store.digest import content_digest
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.file_names import TOKEN_LIST, TOKENIZER, cap_of
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.token_list import write_token_list
from deltaserve_store.spec import BaseSpec
from deltatest.adapter_corpus import corpus_base, write_good_lora

WIDE = "\N{SLIGHTLY SMILING FACE}" * 250
"""Twelve bytes each, as JSON escapes them."""


def roomy_base() -> BaseSpec:
    """With rows for five thousand tokens more than its tokenizer knows."""
    return replace(corpus_base(), vocab_size=5_090)


def tokens_of(count: int) -> list[AddedToken]:
    return [AddedToken(90 + i, f"{WIDE}{i}", is_special=True, normalized=True) for i in range(count)]


def most() -> int:
    """How many of these tokens the list has room for."""
    low, high = 1, 4096
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(write_token_list(tokens_of(middle))) <= cap_of(TOKEN_LIST)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def write(folder: Path, tokens: list[AddedToken]) -> Path:
    write_good_lora(folder)
    listed = [{"id": t.id, "content": t.content, "special": t.is_special, "normalized": t.normalized} for t in tokens]
    (folder / TOKENIZER).write_text(json.dumps({"added_tokens": listed}, ensure_ascii=False), encoding="utf-8")
    return folder


def test_the_longest_list_that_gets_in_is_written_and_read(tmp_path: Path) -> None:
    tokens = tokens_of(most())
    assert len(tokens) > 300
    folder = write(tmp_path / "adapter", tokens)
    parsed = read_adapter(folder, roomy_base())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    stored = with_token_list(folder, parsed, scratch)
    assert (stored / TOKEN_LIST).stat().st_size <= cap_of(TOKEN_LIST)
    assert content_digest(stored)
    assert read_adapter(stored, roomy_base()).added_tokens == tuple(tokens)


def test_one_token_more_is_refused_as_what_it_is(tmp_path: Path) -> None:
    """It was written, and then not read: the refusal named a file that nobody had uploaded."""
    tokens = tokens_of(most() + 1)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(write(tmp_path / "adapter", tokens), roomy_base())
    (reason,) = raised.value.reasons
    assert (reason.code, reason.where) == ("added_tokens", "tokenizer")
    assert f"{len(tokens)} tokens" in reason.found
    assert f"{len(write_token_list(tokens))} bytes" in reason.found
    assert f"at most {cap_of(TOKEN_LIST)} bytes" in reason.allowed
