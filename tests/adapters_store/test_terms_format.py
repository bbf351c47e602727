"""The project's format of sums: what is written is read, and damaged files are refused with every reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaserve_store.digest import content_digest
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.deltaserve_terms import write_terms_adapter
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_store.reason_codes import REASON_CODES
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltatest.adapter_corpus import FINGERPRINT, Q0, BadAdapter, corpus_base
from deltatest.terms_corpus import NORM0, TERMS_CORPUS, V1, write_good_terms


def test_every_term_comes_back(tmp_path: Path) -> None:
    parsed = read_adapter(write_good_terms(tmp_path / "adapter"), corpus_base())
    assert parsed.file_format == "deltaserve-terms"
    assert parsed.kinds == ("lora", "sparse", "vector")
    assert parsed.rank == 3
    assert parsed.config["method"] == "by hand"
    assert parsed.num_parameters == 3 * 32 + 4 + 32 + 2 * 24 + 16
    low, entries, vectors, other, gain = parsed.deltas
    assert isinstance(low, LoraDelta)
    assert low.module == Q0
    assert low.scaling == 1.0
    generator = torch.Generator().manual_seed(19)
    torch.testing.assert_close(low.b, 2 * torch.randn(16, 3, generator=generator))  # the scaling went into b
    assert isinstance(entries, SparseDelta)
    assert entries.rows.tolist() == [0, 3, 3, 9]
    assert entries.cols.tolist() == [5, 1, 2, 0]
    assert isinstance(vectors, VectorDelta)
    assert vectors.bias is not None
    assert isinstance(other, LoraDelta)
    assert other.module == V1
    assert isinstance(gain, NormDelta)
    assert gain.module == NORM0


def test_the_same_terms_are_one_version(tmp_path: Path) -> None:
    first, second = write_good_terms(tmp_path / "a"), write_good_terms(tmp_path / "b")
    assert content_digest(first) == content_digest(second)


@pytest.mark.parametrize("case", TERMS_CORPUS, ids=lambda case: case.name)
def test_refused_with_its_reasons(case: BadAdapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(case.write(tmp_path / "adapter"), corpus_base())
    found = {(reason.code, reason.where) for reason in raised.value.reasons}
    assert found == set(case.reasons) if case.is_exact else found >= set(case.reasons)
    assert {code for code, _ in found} <= set(REASON_CODES)


@pytest.mark.parametrize(
    ("deltas", "told"),
    [
        ([], "nothing to write"),
        ([NormDelta(NORM0, gain=torch.ones(16), replaces=True)], "not a change"),
        ([VectorDelta(Q0, new_bias=torch.ones(16))], "not a change"),
        ([VectorDelta(Q0, out_scale=torch.ones(16), scales_bias=True)], "not a change"),
        ([LoraDelta(Q0, torch.ones(1, 16), torch.ones(16, 1), 1.0, magnitude=torch.ones(16))], "a magnitude"),
        ([LoraDelta(Q0, torch.ones(1, 16), torch.ones(16, 1), 1.0)] * 2, "two deltas"),
        ([SparseDelta(Q0, *[torch.zeros(2, dtype=torch.int32)] * 2, torch.ones(2))], "twice"),
    ],
)
def test_what_the_format_cannot_say_is_not_written(deltas: list, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        write_terms_adapter(tmp_path, deltas, FINGERPRINT)
