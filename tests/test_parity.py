"""The parity table: every kind that is called served is in it, the committed page is of these kinds, and its measure
would notice a kind that is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltaserve.core import Mix
from deltatest.parity.ensembles import BASE, CASES, NUM_ANSWERED, Case, EnsembleRow
from deltatest.parity.measure import Measured, Row, measure
from deltatest.parity.page import (
    COMMAND,
    ENSEMBLE_HEAD,
    HEAD,
    names_of,
    names_of_ensemble,
    parity_page,
    read_page,
)
from deltatest.parity.registry import NOT_MEASURED, Entry, entries
from deltatest.peft_adapters import base_logits

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "parity.md"


def _served() -> set[str]:
    """First columns of the two tables of docs/adapter-kinds.md."""
    text = (DOCS / "adapter-kinds.md").read_text(encoding="utf-8")
    kinds: set[str] = set()
    for section in ("Served", "Prefixes"):
        lines = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
        kinds |= set([line.split("|")[1].strip() for line in lines if line.startswith("|")][2:])
    return kinds


def test_every_kind_that_is_served_has_a_row_or_a_reason() -> None:
    measured = {entry.kind for entry in entries()}
    assert measured | set(NOT_MEASURED) == _served()
    assert not measured & set(NOT_MEASURED)


def test_adapters_that_add_tokens_are_measured() -> None:
    assert {entry.kind for entry in entries() if entry.num_token_ids} == {"LoRA", "Trainable tokens"}


def test_names_are_adapter_names_and_differ() -> None:
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name) for name in names)


def test_the_committed_page_is_of_these_kinds_and_good() -> None:
    rows = read_page(PAGE.read_text(encoding="utf-8"))
    wanted = f"run {COMMAND}"
    assert [row[:4] for row in rows] == [names_of(entry) for entry in entries()], wanted
    for row in rows:
        cells = dict(zip(HEAD, row, strict=True))
        assert float(cells["alone"]) < 1e-3 < float(cells["effect"]), row
        assert cells["in company"].endswith("same bits"), row
        assert float(cells["in company"].partition(",")[0]) < 1e-3, row
        assert cells["strength 0"] in ("base's bits", "has none"), row
        assert cells["evicted, reloaded"] == "same bits", row
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(parity_page([]).partition("\nMeasured on")[0]), wanted


def test_the_committed_page_is_of_these_ensembles_and_good() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = read_page(text, ENSEMBLE_HEAD)
    assert [row[:3] for row in rows] == [names_of_ensemble(case) for case in CASES], f"run {COMMAND}"
    for row in rows:
        cells = dict(zip(ENSEMBLE_HEAD, row, strict=True))
        assert float(cells["alone"]) < 1e-3 < float(cells["effect"]), row
        assert float(cells["in company"].partition(",")[0]) < 1e-3, row
        assert cells["likeliest tokens"] == f"{NUM_ANSWERED} of {NUM_ANSWERED}", row
        assert cells["in company"].endswith("same bits"), row
        assert cells["evicted, reloaded"] == "same bits", row
    told = parity_page([]).partition("\n## ")[2].partition(f"| {ENSEMBLE_HEAD[0]} |")[0]
    assert told.startswith("Several models as one")
    assert told in text


def test_members_of_ensembles_are_adapters_of_the_table() -> None:
    names = {entry.name for entry in entries()} | {BASE}
    assert {name for case in CASES for name, _ in case.members} <= names
    assert {case.mix for case in CASES} == set(Mix)


@pytest.fixture(scope="module")
def measured() -> Measured:
    """Five kinds, and one that is not what its judge says; ensembles without and with that one."""
    chosen = {entry.name: entry for entry in entries()}
    lora = chosen["lora"]
    wrong = replace(lora, variant="wrong judge", oracle=chosen["shira"].oracle, write=chosen["shira"].write)
    wrong = replace(wrong, oracle=lambda model, folder, ids: base_logits(model, ids) * 1.01)
    activated, grown = chosen["lora-activated-in-the-middle"], chosen["trainable-tokens-added-tokens"]
    kinds = [lora, chosen["deltaserve-sparse"], chosen["ia3"], activated, grown, wrong]
    cases = [
        Case("contrast", Mix.LOGITS, (("lora", 1.5), (BASE, -0.5))),
        Case("mixture", Mix.PROBABILITIES, (("ia3", 2.0), ("deltaserve-sparse", 1.0), ("ia3", 0.5))),
        Case("with a wrong member", Mix.LOGITS, (("lora", 0.7), (wrong.name, 0.3))),
    ]
    return measure(kinds, cases)


@pytest.fixture(scope="module")
def rows(measured: Measured) -> list[Row]:
    return measured.rows


def test_the_measure_finds_parity_and_its_absence(rows: list[Row]) -> None:
    assert [row.is_good for row in rows] == [True, True, True, True, True, False]
    assert all(row.zero_bits for row in rows[:5])


def test_a_row_is_bad_by_each_of_its_parts(rows: list[Row]) -> None:
    good = rows[0]
    changes: tuple[dict[str, Any], ...] = (
        {"alone": 1.0},
        {"mixed": 1.0},
        {"effect": 0.0},
        {"company_bits": False},
        {"zero_bits": False},
        {"reload_bits": False},
    )
    for change in changes:
        assert not replace(good, **change).is_good
    assert replace(good, zero_bits=None).is_good


def test_ensembles_are_in_parity_unless_a_member_is_not(measured: Measured) -> None:
    assert [row.is_good for row in measured.ensembles] == [True, True, False]
    assert [row.likeliest for row in measured.ensembles[:2]] == [NUM_ANSWERED] * 2
    assert measured.bad == ["lora-wrong-judge", "ensemble with a wrong member"]


def test_an_ensemble_is_bad_by_each_of_its_parts(measured: Measured) -> None:
    good = measured.ensembles[0]
    changes: tuple[dict[str, Any], ...] = (
        {"alone": 1.0},
        {"mixed": 1.0},
        {"effect": 0.0},
        {"likeliest": NUM_ANSWERED - 1},
        {"company_bits": False},
        {"reload_bits": False},
    )
    for change in changes:
        assert not replace(good, **change).is_good


def test_the_page_shows_the_ensembles(measured: Measured) -> None:
    row: EnsembleRow = replace(measured.ensembles[0], likeliest=3, reload_bits=False)
    (cells,) = read_page(parity_page([], [row]), ENSEMBLE_HEAD)
    assert cells[:3] == ("contrast", "logits", "1.5 lora, -0.5 base")
    assert cells[4] == f"3 of {NUM_ANSWERED}"
    assert cells[-1] == "OTHER BITS"


def test_the_page_shows_what_was_measured(rows: list[Row]) -> None:
    (cells,) = read_page(parity_page([replace(rows[0], reload_bits=False, slowdown=0.25)]))
    assert cells[:4] == ("LoRA", "", "PEFT", "PEFT")
    assert cells[-3] == "OTHER BITS"
    assert cells[-1] == "+25%"


def test_entries_of_a_family_are_found_by_being_there() -> None:
    assert all(isinstance(entry, Entry) for entry in entries())
    assert {"LoRA", "HiRA", "deltaserve sparse"} <= {entry.kind for entry in entries()}
