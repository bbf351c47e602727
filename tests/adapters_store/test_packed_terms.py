"""Factors of few bits a number: their layout against one written in integers, and damaged files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaserve_store.dense_deltas import DenseDelta, SignDelta
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.deltaserve_terms import write_terms_adapter
from deltaserve_store.packed_factors import BITS, pack_rows, packed_sizes, row_bytes, unpack_rows
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.reason_codes import REASON_CODES
from deltaserve_store.spec import LinearSpec
from deltatest.adapter_corpus import Q0, BadAdapter, corpus_base
from deltatest.packed_corpus import D1, MODULES, PACKED_CORPUS, Q1, V1, drawn_packed, numbers_of, write_good_packed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 7, 8, 21, 64])
def test_codes_come_back_and_lie_as_told(bits: int, width: int) -> None:
    codes = torch.randint(0, 2**bits, (3, width), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (3, row_bytes(width, bits))
    assert torch.equal(unpack_rows(packed, width, bits), codes)
    whole = sum(code << (bits * place) for place, code in enumerate(codes[1].tolist()))
    assert bytes(packed[1].tolist()) == whole.to_bytes(row_bytes(width, bits), "little")


@pytest.mark.parametrize("ranks", [{8: 2, 4: 1, 3: 3, 2: 4}, {3: 1}, {2: 5, 8: 1}], ids=str)
@pytest.mark.parametrize(("shape", "span"), [((21, 37), 16), ((16, 32), 16), ((5, 300), 128), ((33, 9), 256)])
def test_numbers_are_those_of_the_definition(ranks: dict[int, int], shape: tuple[int, int], span: int) -> None:
    packed = drawn_packed("x", shape, ranks, span, seed=3)
    a, b = packed.factors()
    expected_a, expected_b = map(torch.tensor, numbers_of(shape, ranks, span, packed.codes, packed.scales))
    assert torch.equal(a, expected_a)
    assert torch.equal(b, expected_b.t())
    assert not packed.spills()
    torch.testing.assert_close(packed.dense(), expected_b.t() @ expected_a, atol=1e-4, rtol=1e-5)


def test_every_term_comes_back(tmp_path: Path) -> None:
    folder = write_good_packed(tmp_path / "adapter")
    parsed = read_adapter(folder, corpus_base())
    assert json.loads((folder / "adapter.json").read_text())["modules"] == MODULES
    assert parsed.kinds == ("dense", "lora")
    assert parsed.rank == 6
    assert parsed.num_parameters == 6 * 32 + 3 * 24 + 16 * 24 + (16 * 16 + 16)
    known = [delta for delta in parsed.deltas if isinstance(delta, LoraDelta | DenseDelta | SignDelta)]
    by_module = {delta.module: delta for delta in known}
    assert len(by_module) == len(parsed.deltas)
    stored = load_file(folder / "adapter.safetensors")
    both, alone = by_module[Q0], by_module[V1]
    assert isinstance(both, LoraDelta)
    assert isinstance(alone, LoraDelta)
    expected = drawn_packed(V1, (8, 16), {4: 3}, 16, seed=2)
    rows, _ = numbers_of(expected.shape, expected.ranks, 16, expected.codes, expected.scales)
    assert torch.equal(alone.a, torch.tensor(rows))
    assert torch.equal(both.a[:2], stored[f"{Q0}.a"])
    for delta in (both, alone):
        assert delta.dense is not None
        assert delta.is_exact
        torch.testing.assert_close(delta.dense(), delta.b @ delta.a, atol=1e-5, rtol=1e-5)
    matrix, signs = by_module[D1], by_module[Q1]
    assert isinstance(matrix, DenseDelta)
    assert torch.equal(matrix.delta, stored[f"{D1}.delta"])
    assert isinstance(signs, SignDelta)
    assert torch.equal(signs.signs, stored[f"{Q1}.signs"])


def test_the_formula_of_the_proof_sees_every_tensor(tmp_path: Path) -> None:
    """One number of the file changed, and both forms change alike; so neither takes it from anywhere else."""
    folder = write_good_packed(tmp_path / "adapter")
    stored = load_file(folder / "adapter.safetensors")
    before = {delta.module: delta.dense() for delta in _lora(folder)}
    for name in (f"{V1}.codes", f"{V1}.scales"):
        changed = {key: tensor.clone() for key, tensor in stored.items()}
        changed[name][-1] = 255 if name.endswith("codes") else 3.0
        save_file(changed, folder / "adapter.safetensors")
        delta = next(delta for delta in _lora(folder) if delta.module == V1)
        assert not torch.equal(delta.dense(), before[V1])
        torch.testing.assert_close(delta.dense(), delta.b @ delta.a, atol=1e-5, rtol=1e-5)


def _lora(folder: Path) -> list:
    return [delta for delta in read_adapter(folder, corpus_base()).deltas if isinstance(delta, LoraDelta)]


def test_a_bit_past_the_last_number_is_refused(tmp_path: Path) -> None:
    """Three bits a number fill no whole bytes where rows have an odd number of them."""
    packed = drawn_packed("x", (5, 7), {3: 2}, 16, seed=1)
    assert not packed.spills()
    packed.codes[2] |= 1 << 7  # 7 numbers of 3 bits end at bit 21; a row has 24
    assert packed.spills()
    base = corpus_base()
    narrow = replace(base, linears={V1: LinearSpec(V1, 5, 7)})
    write_terms_adapter(tmp_path, [replace(packed, module=V1)], base.fingerprint)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(tmp_path, narrow)
    assert [(reason.code, reason.where) for reason in raised.value.reasons] == [("index_out_of_range", f"{V1}.codes")]
    write_terms_adapter(tmp_path, [drawn_packed(V1, (5, 7), {3: 2}, 16, seed=1)], base.fingerprint)
    assert read_adapter(tmp_path, narrow).rank == 2


def test_sizes_are_those_of_the_layout() -> None:
    assert packed_sizes((8, 16), {4: 3}, 16) == (3 * (8 + 4), 3 * 2)
    assert packed_sizes((5, 7), {8: 1, 3: 2}, 16) == (12 + 2 * (3 + 2), 3 * 2)


@pytest.mark.parametrize("case", PACKED_CORPUS, ids=lambda case: case.name)
def test_refused_with_its_reasons(case: BadAdapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(case.write(tmp_path / "adapter"), corpus_base())
    found = {(reason.code, reason.where) for reason in raised.value.reasons}
    assert found == set(case.reasons) if case.is_exact else found >= set(case.reasons)
    assert {code for code, _ in found} <= set(REASON_CODES)
