"""Folding: runtime terms equal the matrices that the files mean, and nothing that does not fit gets through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaserve.deltas.fold import dense_delta, dense_deltas, fold, fold_key
from deltaserve.deltas.folded import FOLD_VERSION, FoldedAdapter, LowRankTerm, SparseTerm
from deltaserve.errors import AdapterRefused
from deltaserve_store.parsed import LoraDelta, ParsedAdapter, SparseDelta
from deltaserve_store.spec import BaseSpec, LinearSpec

SPEC = BaseSpec(
    fingerprint="f" * 64,
    names=("tests/tiny",),
    model_type="llama",
    linears={
        "layers.0.q": LinearSpec("layers.0.q", out_features=24, in_features=16),
        "layers.0.up": LinearSpec("layers.0.up", out_features=40, in_features=16),
    },
    vocab_size=64,
    num_layers=1,
    hidden_size=16,
)


def parsed(*deltas: LoraDelta | SparseDelta) -> ParsedAdapter:
    is_lora = isinstance(deltas[0], LoraDelta)
    return ParsedAdapter(
        kind="lora" if is_lora else "sparse",
        file_format="peft-lora" if is_lora else "deltaserve-sparse",
        deltas=deltas,
        config={},
        base_name="tests/tiny",
        base_fingerprint=None,
        rank=4 if is_lora else None,
        num_parameters=1,
    )


def lora(module: str, rank: int, scaling: float, dtype: torch.dtype = torch.float32, size: float = 1.0) -> LoraDelta:
    generator = torch.Generator().manual_seed(rank)
    linear = SPEC.linears[module]
    a = torch.randn(rank, linear.in_features, generator=generator) * size
    b = torch.randn(linear.out_features, rank, generator=generator) * size
    return LoraDelta(module, a.to(dtype), b.to(dtype), scaling)


def sparse(module: str, count: int) -> SparseDelta:
    generator = torch.Generator().manual_seed(count)
    linear = SPEC.linears[module]
    flat = torch.randperm(linear.out_features * linear.in_features, generator=generator)[:count]
    return SparseDelta(
        module,
        (flat // linear.in_features).int(),
        (flat % linear.in_features).int(),
        torch.randn(count, generator=generator),
    )


@pytest.mark.parametrize("scaling", [0.25, 2.0, 3.7])
def test_low_rank_term_equals_the_scaled_product(scaling: float) -> None:
    delta = lora("layers.0.q", 4, scaling)
    folded = fold(parsed(delta), SPEC, torch.float32)
    (term,) = folded.terms["layers.0.q"]
    assert isinstance(term, LowRankTerm)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    expected = x @ (scaling * (delta.b @ delta.a)).t()
    torch.testing.assert_close((x @ term.a.t()) @ term.b_t, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dense_delta(folded, "layers.0.q", SPEC), scaling * (delta.b @ delta.a))


def test_scaling_is_folded_before_the_one_cast() -> None:
    """alpha / r = 1/3 is not a bfloat16 number: rounding it before the product would cost a second rounding."""
    delta = lora("layers.0.q", 3, 1 / 3, dtype=torch.float32)
    (term,) = fold(parsed(delta), SPEC, torch.bfloat16).terms["layers.0.q"]
    assert isinstance(term, LowRankTerm)
    assert torch.equal(term.b_t, (delta.b * (1 / 3)).t().to(torch.bfloat16))
    assert term.a.dtype == torch.bfloat16
    assert term.b_t.is_contiguous()


def test_sparse_term_equals_the_scattered_matrix() -> None:
    delta = sparse("layers.0.up", 37)
    folded = fold(parsed(delta), SPEC, torch.float32)
    (term,) = folded.terms["layers.0.up"]
    assert isinstance(term, SparseTerm)
    dense = torch.zeros(40, 16)
    for row, col, value in zip(delta.rows.tolist(), delta.cols.tolist(), delta.values.tolist(), strict=True):
        dense[row, col] = value
    rebuilt = torch.zeros(40, 16)
    for row in range(40):
        start, stop = int(term.indptr[row]), int(term.indptr[row + 1])
        cols = term.cols[start:stop].tolist()
        assert cols == sorted(cols)
        rebuilt[row, cols] = term.values[start:stop]
    torch.testing.assert_close(rebuilt, dense)
    torch.testing.assert_close(dense_delta(folded, "layers.0.up", SPEC), dense)
    torch.testing.assert_close(dense_delta(parsed(delta), "layers.0.up", SPEC), dense)


def test_kinds_rank_bytes_and_order() -> None:
    adapter = parsed(lora("layers.0.up", 4, 1.0), lora("layers.0.q", 2, 1.0))
    folded = fold(adapter, SPEC, torch.float32)
    assert list(folded.terms) == ["layers.0.q", "layers.0.up"]
    assert (folded.kinds, folded.rank) == (("lora",), 4)
    assert folded.nbytes == 4 * (4 * (40 + 16) + 2 * (24 + 16))
    empty = fold(parsed(sparse("layers.0.q", 3)), SPEC, torch.float32)
    assert (empty.kinds, empty.rank) == (("sparse",), None)


def test_oracle_is_independent_of_the_folded_form() -> None:
    """Both sides of the proof must not share a mistake: the parsed oracle reads the file's own tensors."""
    adapter = parsed(lora("layers.0.q", 4, 2.0), lora("layers.0.up", 4, 2.0))
    lazy = dense_deltas(adapter, SPEC)
    assert set(lazy) == {"layers.0.q", "layers.0.up"}
    folded = fold(adapter, SPEC, torch.float32)
    (term,) = folded.terms["layers.0.q"]
    assert isinstance(term, LowRankTerm)
    term.b_t.mul_(3)
    assert not torch.allclose(lazy["layers.0.q"](), dense_delta(folded, "layers.0.q", SPEC))


def refused(*deltas: LoraDelta | SparseDelta, dtype: torch.dtype = torch.float32) -> list[tuple[str, str]]:
    with pytest.raises(AdapterRefused) as caught:
        fold(parsed(*deltas), SPEC, dtype)
    return [(reason.code, reason.where) for reason in caught.value.reasons]


def test_every_misfit_is_named() -> None:
    good = lora("layers.0.q", 4, 1.0)
    unknown = LoraDelta("layers.9.q", good.a, good.b, 1.0)
    wide = LoraDelta("layers.0.up", good.a, good.b, 1.0)
    assert refused(good, good, unknown, wide) == [
        ("duplicate_module", "layers.0.q"),
        ("shape_mismatch", "layers.0.up"),
        ("unknown_module", "layers.9.q"),
    ]


@pytest.mark.parametrize(("row", "col"), [(24, 0), (-1, 0), (0, 16), (0, -1)])
def test_indices_outside_the_base_are_refused(row: int, col: int) -> None:
    delta = SparseDelta("layers.0.q", torch.tensor([row]).int(), torch.tensor([col]).int(), torch.ones(1))
    assert refused(delta) == [("index_out_of_range", "layers.0.q")]


def test_overflow_in_the_cast_is_refused() -> None:
    big = lora("layers.0.q", 4, 1.0, size=1e5)
    assert refused(big, dtype=torch.float16) == [
        ("value_out_of_range", "layers.0.q (A)"),
        ("value_out_of_range", "layers.0.q (scaling * B)"),
    ]
    assert refused(lora("layers.0.q", 4, 1e38, size=1e5)) == [("value_out_of_range", "layers.0.q (scaling * B)")]


def test_fold_key_tells_base_dtype_and_fold_version() -> None:
    assert fold_key("abc", torch.bfloat16) == f"abc-bfloat16-fold{FOLD_VERSION}"


def test_terms_of_two_kinds_on_one_linear_add_up(tmp_path: Path) -> None:
    low, entries = lora("layers.0.q", 4, 0.5), sparse("layers.0.q", 20)
    folded = fold(parsed(low, entries), SPEC, torch.float32)
    assert [type(term) for term in folded.terms["layers.0.q"]] == [LowRankTerm, SparseTerm]
    assert folded.kinds == ("lora", "sparse")
    expected = 0.5 * (low.b @ low.a)
    expected[entries.rows.long(), entries.cols.long()] += entries.values
    torch.testing.assert_close(dense_delta(folded, "layers.0.q", SPEC), expected)
    torch.testing.assert_close(dense_delta(parsed(low, entries), "layers.0.q", SPEC), expected)
    folded.save(tmp_path / "folded.safetensors")
    again = FoldedAdapter.load(tmp_path / "folded.safetensors", SPEC, torch.float32)
    assert torch.equal(dense_delta(again, "layers.0.q", SPEC), dense_delta(folded, "layers.0.q", SPEC))
    assert refused(low, entries, entries) == [("duplicate_module", "layers.0.q")]
