"""Residual modules and whole-weight differences: what is read, what is refused, and what cannot be written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltaserve_kernels import ACTIVATIONS as RUN
from deltaserve_store.bottleneck_deltas import ACTIVATIONS, BottleneckDelta
from deltaserve_store.dense_deltas import DenseDelta, MaskDelta, SignDelta
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import deltaserve_dense, read_adapter
from deltaserve_store.formats.deltaserve_bottleneck import write_bottleneck_adapter
from deltaserve_store.formats.deltaserve_dense import write_dense_adapter
from deltaserve_store.reason_codes import REASON_CODES
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltatest.adapter_corpus import FINGERPRINT, Q0, BadAdapter, corpus_base
from deltatest.apart_corpus import APART_CORPUS, APART_GOOD, IN1, NORM0, OUT0


def test_good_modules_get_in(tmp_path: Path) -> None:
    parsed = read_adapter(APART_GOOD["bottleneck"](tmp_path / "adapter"), corpus_base())
    assert (parsed.kind, parsed.file_format, parsed.rank) == ("bottleneck", "deltaserve-bottleneck", 4)
    found = {delta.point: delta for delta in parsed.deltas if isinstance(delta, BottleneckDelta)}
    assert list(found) == ["final_hidden", OUT0, IN1]
    assert (found[OUT0].is_parallel, found[OUT0].scale, found[OUT0].activation) == (True, 2.0, "gelu")
    assert (found[IN1].is_parallel, found[IN1].scale, found[IN1].down_bias) == (False, 1.0, None)
    assert parsed.num_parameters == 2 * 4 * 32 + 4 + 16 + 3 * 32 + 16


def test_good_differences_get_in(tmp_path: Path) -> None:
    parsed = read_adapter(APART_GOOD["dense"](tmp_path / "adapter"), corpus_base())
    assert (parsed.kind, parsed.file_format, parsed.rank) == ("dense", "deltaserve-dense", None)
    types = [type(delta) for delta in parsed.deltas]
    assert types == [DenseDelta, VectorDelta, MaskDelta, SignDelta, NormDelta]
    assert parsed.num_parameters == 256 + 16 + 128 + 384 + 16 + 16


@pytest.mark.parametrize("case", APART_CORPUS, ids=lambda case: f"{case.kind}: {case.name}")
def test_refused_with_its_reasons(case: BadAdapter, tmp_path: Path) -> None:
    folder = case.write(tmp_path / "adapter")
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, corpus_base())
    found = {(reason.code, reason.where) for reason in raised.value.reasons}
    assert found == set(case.reasons) if case.is_exact else found >= set(case.reasons)
    for reason in raised.value.reasons:
        assert reason.code in REASON_CODES
        assert reason.where
        assert reason.found
        assert reason.allowed
        assert str(tmp_path) not in repr(reason)


def test_names_are_unique() -> None:
    assert len({(case.kind, case.name) for case in APART_CORPUS}) == len(APART_CORPUS)


def test_more_weights_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 x 16 in full, 8 x 16 of a mask, a sixteenth of 16 x 24 signs."""
    folder = APART_GOOD["dense"](tmp_path / "adapter")
    monkeypatch.setattr(deltaserve_dense, "MAX_DENSE_WEIGHTS", 256 + 128 + 24)
    read_adapter(folder, corpus_base())
    monkeypatch.setattr(deltaserve_dense, "MAX_DENSE_WEIGHTS", 256 + 128 + 23)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, corpus_base())
    assert [reason.code for reason in raised.value.reasons] == ["file_too_large"]


def test_a_base_without_points_has_no_modules(tmp_path: Path) -> None:
    folder = APART_GOOD["bottleneck"](tmp_path / "adapter")
    base = replace(corpus_base(), points=frozenset({OUT0}))
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, base)
    assert {reason.code for reason in raised.value.reasons} == {"unknown_module", "unexpected_tensor"}


def test_what_the_formats_cannot_say_is_not_written(tmp_path: Path) -> None:
    module = BottleneckDelta(OUT0, torch.zeros(2, 16), torch.zeros(16, 2), "relu")
    for deltas in ([], [module, module], [replace(module, activation="mish")]):
        with pytest.raises(ValueError, match=r"no delta|twice|unknown"):
            write_bottleneck_adapter(tmp_path / "a", deltas, FINGERPRINT)
    dense = DenseDelta(Q0, torch.zeros(16, 16))
    wrong: list[list[DenseDelta | VectorDelta | NormDelta]] = [
        [],
        [dense, dense],
        [VectorDelta(Q0, bias=torch.ones(16), out_scale=torch.ones(16))],
        [NormDelta(NORM0, gain=torch.ones(16), replaces=True)],
    ]
    for given in wrong:
        with pytest.raises(ValueError, match=r"no delta|twice|cannot|can say"):
            write_dense_adapter(tmp_path / "b", given, FINGERPRINT)


def test_every_activation_that_files_may_name_can_be_run() -> None:
    assert set(ACTIVATIONS) == set(RUN)
