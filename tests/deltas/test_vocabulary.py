"""Rows of embedding and head: what is kept of a matrix, what is refused, and what a folded file may not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.deltas import vocabulary
from deltaserve.deltas.fold import fold
from deltaserve.deltas.folded import FoldedAdapter, FoldedFileInvalid, LowRankTerm
from deltaserve.deltas.vector_terms import VectorTerm
from deltaserve.deltas.vocabulary import RowsTerm, row_changes, trained_tokens
from deltaserve.errors import AdapterRefused
from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.parsed import LoraDelta, ParsedAdapter
from deltaserve_store.spec import BaseSpec, LinearSpec
from deltaserve_store.vector_deltas import VectorDelta
from deltatest.of_kind import all_of

E, H, VOCAB, WIDTH = "embed", "head", 50, 6
SPEC = BaseSpec(
    fingerprint="f" * 64,
    names=("tests/tiny",),
    model_type="llama",
    linears={"a.q": LinearSpec("a.q", 5, 6)},
    vocab_size=VOCAB,
    num_layers=1,
    hidden_size=WIDTH,
    embedding=LinearSpec(E, WIDTH, VOCAB),
    head=LinearSpec(H, VOCAB, WIDTH),
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fake_base(dtype: torch.dtype = torch.float32) -> Any:
    weights = {E: randn(VOCAB, WIDTH, seed=1).to(dtype), H: randn(VOCAB, WIDTH, seed=2).to(dtype)}
    return SimpleNamespace(token_rows=lambda name, ids: weights[name][ids])


def parsed(*deltas: Any) -> ParsedAdapter:
    return ParsedAdapter("rows", "peft-trainable-tokens", deltas, {}, None, None, None, 1)


def folded(*deltas: Any, dtype: torch.dtype = torch.float32) -> FoldedAdapter:
    return fold(parsed(*deltas), SPEC, dtype, fake_base(dtype))


def ids_of(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def whole(name: str, changed: tuple[int, ...]) -> Tensor:
    matrix = fake_base().token_rows(name, torch.arange(VOCAB)).clone()
    matrix[list(changed)] += 1.0
    return matrix


def test_of_a_whole_matrix_the_changed_rows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "ROWS_AT_ONCE", 7)  # rows of several pieces
    for changed in ((3, 20, 49), ()):
        terms = folded(RowsDelta(H, None, whole(H, changed))).terms
        if not changed:
            assert not terms
            continue
        (term,) = terms[H]
        assert isinstance(term, RowsTerm)
        assert term.ids.tolist() == list(changed)
        torch.testing.assert_close(term.values, torch.ones(3, WIDTH))
        assert trained_tokens(parsed(RowsDelta(H, None, whole(H, changed))), fake_base()) == list(changed)


def test_rows_that_rounding_alone_tells_apart_are_not_kept() -> None:
    """The base is served in a narrower dtype than the file was saved in."""
    given = randn(VOCAB, WIDTH, seed=1)  # what the base was rounded from
    assert not folded(RowsDelta(E, None, given), dtype=torch.bfloat16).terms
    given[7, 2] += 1.0
    (term,) = folded(RowsDelta(E, None, given), dtype=torch.bfloat16).terms[E]
    assert isinstance(term, RowsTerm)
    assert term.ids.tolist() == [7]


def test_the_oracle_tells_what_rows_become() -> None:
    rows, lora = randn(2, WIDTH, seed=5), LoraDelta(E, randn(2, VOCAB, seed=6), randn(WIDTH, 2, seed=7), 0.5)
    changes = row_changes(parsed(RowsDelta(H, ids_of(4, 9), rows), lora), SPEC, fake_base())
    ids = torch.tensor([9, 4, 5, 9])
    stored = fake_base().token_rows(H, ids)
    torch.testing.assert_close(stored + changes[H](ids), torch.stack([rows[1], rows[0], stored[2], rows[1]]))
    torch.testing.assert_close(changes[E](ids), 0.5 * (lora.b @ lora.a).t()[ids])
    (term,) = folded(lora).terms[E]
    assert isinstance(term, LowRankTerm)
    torch.testing.assert_close(term.a.t()[ids] @ term.b_t, changes[E](ids))


def refused(*deltas: Any) -> list[tuple[str, str]]:
    with pytest.raises(AdapterRefused) as caught:
        folded(*deltas)
    return [(reason.code, reason.where) for reason in caught.value.reasons]


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = randn(2, WIDTH)
    assert refused(RowsDelta("x", ids_of(1, 2), rows)) == [("unknown_module", "x")]
    assert refused(RowsDelta(E, ids_of(1, 2, 3), rows)) == [("shape_mismatch", E)]
    assert refused(RowsDelta(E, None, rows)) == [("shape_mismatch", E)]
    assert refused(RowsDelta(E, ids_of(2, 1), rows)) == [("unsorted_index", E)]
    assert refused(RowsDelta(E, ids_of(1, 1), rows)) == [("unsorted_index", E)]
    assert refused(RowsDelta(E, ids_of(1, VOCAB), rows)) == [("index_out_of_range", E)]
    twice = RowsDelta(E, ids_of(1, 2), rows)
    assert refused(twice, twice) == [("duplicate_module", E)]
    assert refused(RowsDelta(E, None, whole(E, (5,)), is_copy=True)) == [("base_mismatch", E)]
    assert not folded(RowsDelta(E, None, whole(E, ()), is_copy=True)).terms
    monkeypatch.setattr(vocabulary, "MAX_ROWS_BYTES", 3 * WIDTH * 4)
    assert len(folded(RowsDelta(E, None, whole(E, (1, 2, 3)))).terms) == 1
    assert refused(RowsDelta(E, None, whole(E, (1, 2, 3, 4)))) == [("file_too_large", E)]
    with pytest.raises(ValueError, match="give the base"):
        fold(parsed(twice), SPEC, torch.float32)


def test_a_difference_that_overflows_is_refused() -> None:
    huge = torch.full((1, WIDTH), 65504.0)
    base = SimpleNamespace(token_rows=lambda name, ids: torch.full((len(ids), WIDTH), -65504.0, dtype=torch.float16))
    with pytest.raises(AdapterRefused) as caught:
        fold(parsed(RowsDelta(E, ids_of(1), huge)), SPEC, torch.float16, base)
    assert caught.value.reasons[0].code == "value_out_of_range"


def sample() -> FoldedAdapter:
    terms: Any = {
        E: (LowRankTerm(randn(3, VOCAB), randn(3, WIDTH)),),
        H: (LowRankTerm(randn(3, WIDTH), randn(3, VOCAB)), RowsTerm(ids_of(4, 9), randn(2, WIDTH))),
    }
    return FoldedAdapter(terms, SPEC.fingerprint, torch.float32)


def test_a_file_of_rows_comes_back_as_it_was(tmp_path: Path) -> None:
    written = sample()
    written.save(tmp_path / "f")
    read = FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)
    assert (read.kinds, read.nbytes) == (("lora", "rows"), written.nbytes)
    low_rank, _ = read.terms[H]
    assert isinstance(low_rank, LowRankTerm)
    rows, given = all_of(RowsTerm, (adapter.terms[H][1] for adapter in (read, written)))
    assert torch.equal(rows.ids, given.ids)
    assert torch.equal(rows.values, given.values)


@pytest.mark.parametrize(
    "rows",
    [
        RowsTerm(ids_of(4, 50), randn(2, WIDTH)),
        RowsTerm(ids_of(-1, 5), randn(2, WIDTH)),
        RowsTerm(ids_of(9, 4), randn(2, WIDTH)),
        RowsTerm(ids_of(4, 4), randn(2, WIDTH)),
        RowsTerm(ids_of(4, 9), randn(2, WIDTH + 1)),
        RowsTerm(ids_of(4, 9), randn(3, WIDTH)),
        RowsTerm(ids_of(4, 9).float(), randn(2, WIDTH)),
        RowsTerm(ids_of(4, 9), randn(2, WIDTH).bfloat16()),
        RowsTerm(ids_of(), randn(0, WIDTH)),
    ],
)
def test_rows_that_do_not_fit_the_base_do_not_load(tmp_path: Path, rows: RowsTerm) -> None:
    change: Callable[[FoldedAdapter], FoldedAdapter] = lambda a: replace(a, terms={**a.terms, H: (rows,)})  # noqa: E731
    change(sample()).save(tmp_path / "f")
    with pytest.raises(FoldedFileInvalid):
        FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)


def test_magnitudes_scale_rows_of_the_head_and_columns_of_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "ROWS_AT_ONCE", 7)  # norms over tokens of several pieces
    base = fake_base()
    weights = SimpleNamespace(rows=lambda i, j: base.token_rows(H, torch.arange(i, min(j, VOCAB))), bias=None)
    base.linear = {H: weights}.__getitem__
    for name, shape, size in ((E, (WIDTH, VOCAB), WIDTH), (H, (VOCAB, WIDTH), VOCAB)):
        a, b, magnitude = randn(2, shape[1], seed=3), randn(shape[0], 2, seed=4), 1 + randn(size, seed=5).abs()
        given = parsed(LoraDelta(name, a, b, 0.5, magnitude=magnitude))
        stored = base.token_rows(name, torch.arange(VOCAB))
        weight = (stored.t() if name == E else stored) + 0.5 * b @ a
        weight = weight * (magnitude / weight.norm(dim=1))[:, None]
        wanted = (weight.t() if name == E else weight) - stored
        torch.testing.assert_close(row_changes(given, SPEC, base)[name](torch.arange(VOCAB)), wanted)
        low_rank, vectors = fold(given, SPEC, torch.float32, base).terms[name]
        assert isinstance(low_rank, LowRankTerm)
        assert isinstance(vectors, VectorTerm)
        assert vectors.scale is not None
        product = low_rank.b_t.t() @ low_rank.a
        scaled = stored * (vectors.scale - 1 if name == E else (vectors.scale - 1)[:, None])
        torch.testing.assert_close(scaled + (product.t() if name == E else product), wanted)


def test_a_vector_of_the_embedding_alone_is_refused() -> None:
    base = fake_base()
    base.linear = {}.__getitem__
    with pytest.raises(AdapterRefused) as caught:
        fold(parsed(VectorDelta(E, bias=randn(WIDTH))), SPEC, torch.float32, base)
    assert [(reason.code, reason.where) for reason in caught.value.reasons] == [("unknown_module", E)]


@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        (E, VectorTerm(scale=randn(VOCAB))),
        (E, VectorTerm(scale=randn(WIDTH), bias=randn(WIDTH))),
        (E, VectorTerm(in_scale=randn(VOCAB))),
        (H, VectorTerm(scale=randn(WIDTH))),
        (H, VectorTerm(scale=randn(VOCAB), in_scale=randn(WIDTH))),
        (H, VectorTerm(bias=randn(VOCAB).bfloat16())),
    ],
)
def test_vectors_that_do_not_fit_a_matrix_do_not_load(tmp_path: Path, name: str, vectors: VectorTerm) -> None:
    good: Any = {E: (VectorTerm(scale=randn(WIDTH)),), H: (VectorTerm(scale=randn(VOCAB), bias=randn(VOCAB)),)}
    FoldedAdapter(good, SPEC.fingerprint, torch.float32).save(tmp_path / "good")
    assert FoldedAdapter.load(tmp_path / "good", SPEC, torch.float32).kinds == ("vector",)
    FoldedAdapter({**good, name: (vectors,)}, SPEC.fingerprint, torch.float32).save(tmp_path / "f")
    with pytest.raises(FoldedFileInvalid):
        FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)


def test_rows_of_a_linear_do_not_load(tmp_path: Path) -> None:
    terms: Any = {"a.q": (RowsTerm(ids_of(1, 2), randn(2, WIDTH)),)}
    FoldedAdapter(terms, SPEC.fingerprint, torch.float32).save(tmp_path / "f")
    with pytest.raises(FoldedFileInvalid, match="unexpected parts"):
        FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)
