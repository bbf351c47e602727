"""Row and column blocks: folds against dense matrices, and what a folded file of blocks may not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.deltas.blocks import BlockTerm
from deltaserve.deltas.fold import dense_delta, fold
from deltaserve.deltas.folded import FoldedAdapter, FoldedFileInvalid
from deltaserve.errors import AdapterRefused
from deltaserve_store.block_deltas import BlockDelta
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec, LinearSpec

SPEC = BaseSpec("f" * 64, ("tests/tiny",), "llama", {"a.q": LinearSpec("a.q", 5, 7)}, 64, 1, 7)
X = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def parsed(*deltas: BlockDelta) -> ParsedAdapter:
    return ParsedAdapter("block", "deltaserve-blocks", deltas, {}, None, None, None, 1)


CASES = (
    BlockDelta("a.q", ints(0, 3), None, randn(2, 7)),
    BlockDelta("a.q", None, ints(1, 6), randn(5, 2)),
    BlockDelta("a.q", ints(4), ints(0, 2, 3), randn(1, 3)),
    BlockDelta("a.q", ints(0, 1, 2, 3, 4), None, randn(5, 7)),
)


@pytest.mark.parametrize("delta", CASES)
def test_a_fold_is_the_dense_matrix(delta: BlockDelta, tmp_path: Path) -> None:
    wanted = torch.zeros(5, 7)
    for i, row in enumerate(range(5) if delta.out_rows is None else delta.out_rows.tolist()):
        for j, col in enumerate(range(7) if delta.in_cols is None else delta.in_cols.tolist()):
            wanted[row, col] = delta.values[i, j]
    folded = fold(parsed(delta), SPEC, torch.float32)
    assert torch.equal(dense_delta(parsed(delta), "a.q", SPEC), wanted)
    assert torch.equal(dense_delta(folded, "a.q", SPEC), wanted)
    folded.save(tmp_path / "f")
    read = FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)
    assert (read.kinds, read.nbytes) == (("block",), folded.nbytes)
    assert torch.equal(dense_delta(read, "a.q", SPEC), wanted)


@pytest.mark.parametrize(
    ("delta", "code"),
    [
        (BlockDelta("a.k", ints(0), None, randn(1, 7)), "unknown_module"),
        (BlockDelta("a.q", None, None, randn(5, 7)), "invalid_value"),
        (BlockDelta("a.q", ints(0, 5), None, randn(2, 7)), "index_out_of_range"),
        (BlockDelta("a.q", ints(-1, 2), None, randn(2, 7)), "index_out_of_range"),
        (BlockDelta("a.q", None, ints(3, 2), randn(5, 2)), "unsorted_index"),
        (BlockDelta("a.q", None, ints(3, 3), randn(5, 2)), "unsorted_index"),
        (BlockDelta("a.q", ints(), None, randn(0, 7)), "index_out_of_range"),
        (BlockDelta("a.q", ints(0, 2), None, randn(3, 7)), "shape_mismatch"),
        (BlockDelta("a.q", ints(0), None, torch.full((1, 7), 1e30)), "value_out_of_range"),
    ],
)
def test_what_does_not_fit_is_refused(delta: BlockDelta, code: str) -> None:
    with pytest.raises(AdapterRefused) as caught:
        fold(parsed(delta), SPEC, torch.float16)
    assert [reason.code for reason in caught.value.reasons] == [code]


def test_two_blocks_of_one_linear_are_refused() -> None:
    with pytest.raises(AdapterRefused) as caught:
        fold(parsed(CASES[0], CASES[1]), SPEC, torch.float32)
    assert [reason.code for reason in caught.value.reasons] == ["duplicate_module"]


@pytest.mark.parametrize(
    "term",
    [
        BlockTerm(randn(2, 7), ints(0, 5), None, 7, 5),
        BlockTerm(randn(2, 7), ints(3, 0), None, 7, 5),
        BlockTerm(randn(3, 7), ints(0, 3), None, 7, 5),
        BlockTerm(randn(5, 2), None, ints(0, 3), 7, 5),  # of a column block the file has the transpose
        BlockTerm(randn(2, 7).bfloat16(), ints(0, 3), None, 7, 5),
        BlockTerm(randn(2, 7), ints(0, 3).float(), None, 7, 5),
        BlockTerm(randn(5, 7), None, None, 7, 5),
    ],
)
def test_blocks_that_do_not_fit_the_base_do_not_load(term: BlockTerm, tmp_path: Path) -> None:
    terms: Any = {"a.q": (term,)}
    FoldedAdapter(terms, SPEC.fingerprint, torch.float32).save(tmp_path / "f")
    with pytest.raises(FoldedFileInvalid):
        FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)
