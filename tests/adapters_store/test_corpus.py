"""None of the corpus of damaged, mis-named and hostile adapters gets in, and each refusal says why."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from deltaserve_store.errors import AdapterInvalid, BaseMismatch
from deltaserve_store.formats import read_adapter
from deltaserve_store.reason_codes import REASON_CODES
from deltatest.adapter_corpus import CORPUS, FINGERPRINT, GOOD, BadAdapter, corpus_base, write_good_lora
from deltatest.vector_corpus import VECTOR_CORPUS, VECTOR_GOOD


@pytest.mark.parametrize("kind", GOOD)
def test_good_adapters_get_in(kind: str, tmp_path: Path) -> None:
    """What the corpus spoils was good before; else its refusals would prove nothing."""
    parsed = read_adapter(GOOD[kind](tmp_path / "adapter"), corpus_base())
    assert parsed.kind == ("lora" if kind == "lora" else "sparse")
    assert len(parsed.deltas) == {"lora": 4, "shira": 2, "sparse": 2}[kind]


@pytest.mark.parametrize("kind", VECTOR_GOOD)
def test_good_vectors_get_in(kind: str, tmp_path: Path) -> None:
    parsed = read_adapter(VECTOR_GOOD[kind](tmp_path / "adapter"), corpus_base())
    assert parsed.kind == ("lora" if kind == "dora" else "vector")
    assert len(parsed.deltas) == {"ia3": 4, "norms": 3, "dora": 4, "vectors": 3}[kind]


@pytest.mark.parametrize("case", CORPUS + VECTOR_CORPUS, ids=lambda case: f"{case.kind}: {case.name}")
def test_refused_with_its_reasons(case: BadAdapter, tmp_path: Path) -> None:
    folder = case.write(tmp_path / "adapter")
    before = time.monotonic()
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, corpus_base())
    assert time.monotonic() - before < 2.0
    found = {(reason.code, reason.where) for reason in raised.value.reasons}
    if case.is_exact:
        assert found == set(case.reasons)
    else:
        assert found >= set(case.reasons)
    assert found
    for reason in raised.value.reasons:
        assert reason.code in REASON_CODES
        assert reason.where
        assert reason.found
        assert reason.allowed
        assert str(tmp_path) not in repr(reason)
    assert raised.value.status == 422
    assert os.environ.get("DELTASERVE_CANARY_PICKLE") is None
    assert os.getenv("DELTASERVE_CANARY_PICKLE") is None


def test_corpus_is_large_and_names_are_unique() -> None:
    assert len(CORPUS) >= 100
    cases = CORPUS + VECTOR_CORPUS
    assert len({(case.kind, case.name) for case in cases}) == len(cases)


def test_every_code_of_a_folder_is_in_the_corpus() -> None:
    """Codes of archives and uploads are tested there; all others must be produced by some case."""
    elsewhere = {"duplicate_file", "bad_archive", "archive_path", "archive_bomb", "bit_rot", "too_many_findings"}
    elsewhere.add("seed_not_usable")  # no type of this corpus has seeds: test_kind_corpus
    elsewhere.add("prefix_too_long")  # nor virtual tokens: test_prefix_files
    elsewhere.add("conversion_too_large")  # nor the shapes of a large base: test_conversion_cost
    covered = {code for case in CORPUS for code, _ in case.reasons}
    assert covered == set(REASON_CODES) - elsewhere


def test_wrong_base_is_its_own_error(tmp_path: Path) -> None:
    folder = GOOD["sparse"](tmp_path / "adapter")
    other = corpus_base().__class__("cd" * 32, ("other",), "llama", corpus_base().linears, 100, 2, 16)
    with pytest.raises(BaseMismatch) as raised:
        read_adapter(folder, other)
    assert raised.value.reasons[0].found == FINGERPRINT
    assert raised.value.body()["code"] == "base_mismatch"


def test_conv1d_base_wants_fan_in_fan_out(tmp_path: Path) -> None:
    base = corpus_base(transposed=True)
    read_adapter(write_good_lora(tmp_path / "good", fan_in_fan_out=True), base)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(write_good_lora(tmp_path / "bad"), base)
    assert [reason.code for reason in raised.value.reasons] == ["fan_in_fan_out_mismatch"]
