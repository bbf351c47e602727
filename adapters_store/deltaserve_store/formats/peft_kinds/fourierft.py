"""PEFT FourierFT (Gao et al., arXiv:2405.03003): few coefficients of the delta's two-dimensional spectrum are trained.

``fourierft_spectrum [n]`` at positions drawn from a seed; the delta is ``scaling * real(ifft2(spectrum))``, a sum of
waves ``cos(a_u + b_v) = cos a_u cos b_v - sin a_u sin b_v``. All waves of one row frequency share ``cos a`` and ``sin
a``, and frequencies f and out - f share them up to a sign; so the rank is at most twice the number of row frequencies
that differ in this sense, or of column frequencies. n coefficients have rank ``2 n`` at most, and mostly little less.
Source: peft 0.21, ``tuners/fourierft/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import BIAS, COMMON_FIELDS, FLAG, SEED, SELECTION_FIELDS, FieldRule
from deltaserve_store.formats.peft_kinds.low_rank import from_factors
from deltaserve_store.formats.peft_kinds.positions import (
    COUNT,
    COUNT_PATTERN,
    DEFAULT_SEED,
    SCALING,
    Positions,
    check_positions_of,
    count_of,
)
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec


class FourierFt(PeftReader):
    peft_type = "FOURIERFT"
    title = "FourierFT"
    source = "`fourierft_spectrum`; positions from `random_loc_seed`"
    delta = "`scaling · real(ifft2(S))`"
    term = "low rank, 2 for each row (or column) frequency (at most min(in, out))"
    limits = "an error above the limit, where the rank exceeds the bound; a generator that draws other positions"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **SELECTION_FIELDS,
        "n_frequency": COUNT,
        "n_frequency_pattern": COUNT_PATTERN,
        "scaling": SCALING,
        "random_loc_seed": SEED,
        "bias": BIAS,
        "init_weights": FLAG,
    }

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counts = {linear.name: count_of(self, linear) for linear in self.linears}
        self._positions = Positions(int(self.config.get("random_loc_seed", DEFAULT_SEED)), self.linears, self._counts)

    def check(self, findings: Findings) -> None:
        check_positions_of(self.config, self.where, self.linears, self._counts, findings)

    def _places(self, linear: LinearSpec) -> tuple[Tensor, Tensor]:
        return self._positions.of(linear, self._counts[linear.name])

    def bound(self, linear: LinearSpec) -> int:
        rows, cols = self._places(linear)
        return 2 * min(_num_distinct(rows, linear.out_features), _num_distinct(cols, linear.in_features))

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        return {"fourierft_spectrum": TensorRule((self._counts[linear.name],))}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        spectrum, (rows, cols) = parts["fourierft_spectrum"].float(), self._places(linear)
        scaling = float(self.config.get("scaling", 150.0))
        shape = linear.out_features, linear.in_features

        def dense() -> Tensor:
            """PEFT's inverse transform of the whole spectrum."""
            whole = torch.zeros(shape)
            whole[rows, cols] = spectrum
            return torch.fft.ifft2(whole).real * scaling

        def factors() -> tuple[Tensor, Tensor]:
            if _num_distinct(rows, shape[0]) <= _num_distinct(cols, shape[1]):
                return _waves(spectrum * scaling, rows, cols, shape)
            left, right = _waves(spectrum * scaling, cols, rows, (shape[1], shape[0]))
            return right.t().contiguous(), left.t().contiguous()

        return from_factors(linear, self.bound(linear), factors, 1.0, self.conversion, dense)


def _num_distinct(frequencies: Tensor, period: int) -> int:
    """Frequencies f and period - f count once."""
    return int(torch.minimum(frequencies, (period - frequencies) % period).unique().numel())


def _angles(positions: Tensor, frequencies: Tensor, period: int) -> Tensor:
    """float64 ``[frequencies, positions]``; whole turns are taken off before the numbers get large."""
    return (frequencies[:, None] * positions) % period * (2 * math.pi / period)


def _waves(spectrum: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """``(right [2 k, in], left [out, 2 k])`` float32 of the sum of waves, grouped by the k distinct row frequencies.

    Both sides carry the root of the transform's ``1 / (out * in)``, which alone would leave the range of narrow dtypes.
    """
    mirrored = (shape[0] - rows) % shape[0]
    folded, group = torch.minimum(rows, mirrored).unique(return_inverse=True)
    sign = torch.where(rows <= mirrored, 1.0, -1.0).double()
    by_row = _angles(torch.arange(shape[0]), folded, shape[0])
    by_col = _angles(torch.arange(shape[1]), cols, shape[1])
    root = math.sqrt(shape[0] * shape[1])
    values = spectrum.double() / root
    even = torch.zeros(len(folded), shape[1], dtype=torch.float64)
    even.index_add_(0, group, values[:, None] * by_col.cos())
    odd = torch.zeros_like(even).index_add_(0, group, (-sign * values)[:, None] * by_col.sin())
    left = torch.cat([by_row.cos(), by_row.sin()]).t() / root
    return torch.cat([even, odd]).float(), left.float().contiguous()
