"""The parity table: every kind that is called served is in it, the committed page is of these kinds, and its measure
would notice a kind that is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from deltatest.parity.measure import Row, measure
from deltatest.parity.page import COMMAND, HEAD, names_of, parity_page, read_page
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


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Five kinds, and one that is not what its judge says."""
    chosen = {entry.name: entry for entry in entries()}
    lora = chosen["lora"]
    wrong = replace(lora, variant="wrong judge", oracle=chosen["shira"].oracle, write=chosen["shira"].write)
    wrong = replace(wrong, oracle=lambda model, folder, ids: base_logits(model, ids) * 1.01)
    activated, grown = chosen["lora-activated-in-the-middle"], chosen["trainable-tokens-added-tokens"]
    return measure([lora, chosen["deltaserve-sparse"], chosen["ia3"], activated, grown, wrong])


def test_the_measure_finds_parity_and_its_absence(rows: list[Row]) -> None:
    assert [row.is_good for row in rows] == [True, True, True, True, True, False]
    assert all(row.zero_bits for row in rows[:5])


def test_a_row_is_bad_by_each_of_its_parts(rows: list[Row]) -> None:
    good = rows[0]
    for change in (
        {"alone": 1.0},
        {"mixed": 1.0},
        {"effect": 0.0},
        {"company_bits": False},
        {"zero_bits": False},
        {"reload_bits": False},
    ):
        assert not replace(good, **change).is_good  # type: ignore[arg-type]
    assert replace(good, zero_bits=None).is_good


def test_the_page_shows_what_was_measured(rows: list[Row]) -> None:
    (cells,) = read_page(parity_page([replace(rows[0], reload_bits=False, slowdown=0.25)]))
    assert cells[:4] == ("LoRA", "", "PEFT", "PEFT")
    assert cells[-3] == "OTHER BITS"
    assert cells[-1] == "+25%"


def test_entries_of_a_family_are_found_by_being_there() -> None:
    assert all(isinstance(entry, Entry) for entry in entries())
    assert {"LoRA", "HiRA", "deltaserve sparse"} <= {entry.kind for entry in entries()}
