"""Damaged files of every converted PEFT type are refused, each with its reason and place; the page tells what is so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.peft_kinds.page import kinds_page
from deltaserve_store.formats.peft_kinds.table import READERS, REFUSED, SERVED_PEFT_TYPES
from deltaserve_store.reason_codes import REASON_CODES
from deltatest.adapter_corpus import BadAdapter, corpus_base
from deltatest.kind_corpus import GOOD_KINDS, KIND_CORPUS
from deltatest.rotation_corpus import ROTATION_CORPUS

PAGE = Path(__file__).parents[2] / "docs" / "adapter-kinds.md"


@pytest.mark.parametrize("name", GOOD_KINDS)
def test_good_adapters_get_in(name: str, tmp_path: Path) -> None:
    """What the corpus spoils was good before; else its refusals would prove nothing."""
    parsed = read_adapter(GOOD_KINDS[name](tmp_path / "adapter"), corpus_base())
    assert parsed.deltas or parsed.weight_deltas
    assert parsed.file_format == f"peft-{name}"


@pytest.mark.parametrize("case", KIND_CORPUS + ROTATION_CORPUS, ids=lambda case: f"{case.kind}: {case.name}")
def test_refused_with_its_reasons(case: BadAdapter, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    GOOD_KINDS[case.kind](folder)
    case.spoil(folder)
    before = time.monotonic()
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, corpus_base())
    assert time.monotonic() - before < 2.0
    found = {(reason.code, reason.where) for reason in raised.value.reasons}
    assert found >= set(case.reasons)
    if case.is_exact:
        assert found == set(case.reasons)
    for reason in raised.value.reasons:
        assert reason.code in REASON_CODES
        assert reason.found
        assert reason.allowed


def test_every_reader_is_in_the_corpus() -> None:
    assert {case.kind for case in KIND_CORPUS} == {kind.lower() for kind in READERS} == set(GOOD_KINDS)
    corpus = KIND_CORPUS + ROTATION_CORPUS
    assert len({(case.kind, case.name) for case in corpus}) == len(corpus)


def test_every_type_of_the_installed_peft_is_served_or_refused_with_a_reason() -> None:
    from peft import PeftType

    assert {kind.value for kind in PeftType} <= {*SERVED_PEFT_TYPES, *REFUSED}
    assert not set(SERVED_PEFT_TYPES) & set(REFUSED)


def test_the_page_is_what_the_code_says() -> None:
    wanted = "run python -m deltaserve_store.formats.peft_kinds.page > docs/adapter-kinds.md"
    assert PAGE.read_text(encoding="utf-8") == kinds_page(), wanted
