"""Daubechies' filters from their definition, against the tables that PEFT carries."""

from __future__ import annotations

import pytest
import torch

from deltaserve_store.formats.peft_kinds.wavelets import FAMILIES, low_pass


@pytest.mark.parametrize("family", FAMILIES)
def test_filters_are_those_of_the_tables(family: str) -> None:
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.wavelet import Wavelet

    low = low_pass(int(family[2:]))
    assert torch.allclose(low, torch.tensor(Wavelet(family).rec_lo, dtype=torch.float64), atol=1e-9)
    assert WAVELET_REDUCTIONS[family] == (len(low) - 2, len(low) - 2)


@pytest.mark.parametrize("order", range(1, 11))
def test_shifts_by_two_are_orthonormal(order: int) -> None:
    low = low_pass(order)
    for shift in range(order):
        product = float(low[2 * shift :] @ low[: len(low) - 2 * shift])
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-9)
