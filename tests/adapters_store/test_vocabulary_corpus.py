"""Damaged adapters of embedding and head do not get in, and good ones do, tied or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltatest.adapter_corpus import TENSORS, BadAdapter, corpus_base, edit_tensors
from deltatest.token_corpus import NUM_KNOWN, NUM_ROWS, TOKEN_CORPUS, name_tokens
from deltatest.vocabulary_corpus import (
    ALONE,
    ALONE_HEAD,
    BIASES_AGAIN,
    COPY,
    IDS,
    ROWS,
    VOCABULARY_CORPUS,
    VOCABULARY_GOOD,
    E,
    H,
    vocabulary_base,
)


@pytest.mark.parametrize("kind", VOCABULARY_GOOD)
def test_good_ones_get_in(kind: str, tmp_path: Path) -> None:
    parsed = read_adapter(VOCABULARY_GOOD[kind](tmp_path / "adapter"), vocabulary_base())
    assert parsed.kind == {"alone": "rows", "beside": "vector"}.get(kind, "lora")
    numbers = {"rows": 6, "apart": 6, "alone": 2, "low-rank": 7, "saved": 8}
    numbers |= {"dora": 8, "whole": 8, "beside": 8, "biases": 5, "again": 10}
    assert len(parsed.deltas) == numbers[kind]
    held = load_file(tmp_path / "adapter" / TENSORS)
    copies = sum(held[name].numel() for name in held if name in (COPY, ALONE_HEAD, *BIASES_AGAIN))
    assert parsed.num_parameters == sum(tensor.numel() for tensor in held.values()) - copies


@pytest.mark.parametrize("case", VOCABULARY_CORPUS + TOKEN_CORPUS, ids=lambda case: f"{case.kind}: {case.name}")
def test_refused_with_its_reasons(case: BadAdapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(case.write(tmp_path / "adapter"), vocabulary_base())
    found = {(reason.code, reason.where) for reason in raised.value.reasons}
    assert found == set(case.reasons) if case.is_exact else found >= set(case.reasons)


@pytest.mark.parametrize("kind", ["rows", "apart", "alone"])
def test_as_many_tokens_get_in_as_the_heads_bias_has_numbers(kind: str, tmp_path: Path) -> None:
    folder = VOCABULARY_GOOD[kind](tmp_path / "adapter")
    name_tokens([f"<{i}>" for i in range(NUM_ROWS - NUM_KNOWN)])(folder)
    assert len(read_adapter(folder, vocabulary_base()).added_tokens) == NUM_ROWS - NUM_KNOWN


@pytest.mark.parametrize("kind", VOCABULARY_GOOD)
def test_a_base_whose_matrices_cannot_be_changed_refuses_them(kind: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid):
        read_adapter(VOCABULARY_GOOD[kind](tmp_path / "adapter"), corpus_base())


@pytest.mark.parametrize(("kind", "name"), [("rows", ROWS), ("alone", ALONE)])
def test_rows_come_in_order_of_their_tokens_and_reach_the_tied_head(kind: str, name: str, tmp_path: Path) -> None:
    folder = VOCABULARY_GOOD[kind](tmp_path / "adapter")
    written = load_file(folder / TENSORS)[name]
    rows = [delta for delta in read_adapter(folder, vocabulary_base()).deltas if isinstance(delta, RowsDelta)]
    assert [delta.module for delta in rows] == [E, H]
    for delta in rows:
        assert delta.ids is not None
        assert delta.ids.tolist() == sorted(IDS)
        assert torch.equal(delta.values, written[[IDS.index(token) for token in sorted(IDS)]])
    edit_tensors({ALONE_HEAD: None} if kind == "alone" else {})(folder)
    apart = [d for d in read_adapter(folder, vocabulary_base(is_tied=False)).deltas if isinstance(d, RowsDelta)]
    assert [delta.module for delta in apart] == [E]
