"""The jagged layout on the host: exact both ways, and laid out as its docstring says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve_kernels import OutOfRange
from deltaserve_kernels.triton_ops import jagged
from deltatest.kernel_cases import csr


def random_csr(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int, skewed: bool = False):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, 1, generator=generator) ** 4 * 4 if skewed else 1.0
    mask = torch.rand(rows, columns, generator=generator) < density * weight
    return csr(mask, torch.randn(int(mask.sum()), generator=generator).to(dtype))


def check(indptr, cols, values) -> jagged.JaggedDelta:
    delta = jagged.from_csr(indptr, cols, values)
    for got, given_ in zip(jagged.to_csr(delta), (indptr, cols, values), strict=True):
        assert got.dtype == given_.dtype
        assert torch.equal(got.view(torch.uint8) if got.dim() else got, given_.contiguous().view(torch.uint8))
    return delta


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 127, 128, 129, 300]),
    columns=st.sampled_from([1, 7, 90]),
    density=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    skewed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip_is_exact(rows, columns, density, dtype, skewed, seed):
    check(*random_csr(rows, columns, density, dtype, seed, skewed))


def test_unsorted_columns_explicit_zeros_and_the_last_column_survive():
    indptr = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    cols = torch.tensor([65535, 0, 32768, 65534], dtype=torch.int32)
    delta = check(indptr, cols, torch.tensor([0.0, -0.0, float("nan"), 2.0]))
    assert delta.num_columns == 65536


def test_layout():
    """Rows of 1, 6, 0 and 2 nonzeros: lanes 1, 0, 3, 2, with 3, 2, 0 and 2 fillers, and diagonals of 3 packs and 1."""
    indptr = torch.tensor([0, 1, 7, 7, 9], dtype=torch.int32)
    cols = torch.tensor([9, 1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.int32)
    delta = check(indptr, cols, torch.arange(1.0, 10.0))
    assert delta.lane_of_row[:4].tolist() == [1 + 3 * 256, 0 + 2 * 256, 3, 2 + 2 * 256]
    assert delta.diagonals.tolist() == [0 * 256 + 3, 3 * 256 + 1]
    assert delta.cols.tolist() == [1, 2, 3, 4, 9, 9, 9, 9, 7, 8, 8, 8, 5, 6, 6, 6]
    assert delta.values.tolist() == [2, 3, 4, 5, 1, 0, 0, 0, 8, 9, 0, 0, 6, 7, 0, 0]
    assert delta.window_first.tolist() == [0, 2]


def test_storage_is_near_four_bytes_a_nonzero():
    indptr, cols, values = random_csr(1024, 4096, 0.005, torch.bfloat16, 0)
    assert jagged.from_csr(indptr, cols, values).nbytes < 4.5 * values.numel()


def test_a_column_that_16_bits_cannot_hold_is_refused():
    with pytest.raises(OutOfRange, match="65536"):
        jagged.from_csr(*(torch.tensor(t, dtype=torch.int32) for t in ([0, 1], [65536])), torch.ones(1))
