"""PEFT WaveFT (arXiv:2505.12532): few coefficients of the delta's wavelet transform are trained.

``waveft_spectrum [n]`` at positions drawn from a seed. The coefficients lie in a matrix that is a little larger than
the delta (by the length of the filter less two, made even), four quadrants of which one inverse step of a Daubechies
transform puts together. Each coefficient adds a patch of ``L x L`` entries, L the length of the filter, so that the
delta is sparse with at most ``n L²`` entries; Haar (``db1``, PEFT's default) has patches of 2 x 2. Where that is more
than a quarter of the matrix, it is converted as a matrix without structure. Without the transform (``use_idwt: false``)
the coefficients are the entries.

PEFT filters the rows of the upper right quadrant with the high pass and the columns with the low pass, so rows go by
the quadrant's column and columns by its row. Source: peft 0.21, ``tuners/waveft/{layer,model,waverec2d}.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    BIAS,
    COMMON_FIELDS,
    FLAG,
    SEED,
    SELECTION_FIELDS,
    SWITCH,
    FieldRule,
    one_of,
)
from deltaserve_store.formats.peft_kinds.low_rank import converted
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
from deltaserve_store.formats.sparse_entries import sort_entries
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_store.spec import LinearSpec

FAMILIES = tuple(f"db{order}" for order in range(1, 11))
_LARGEST_SHARE = 0.25
"""Of a linear's entries: a sparse entry is stored as value and column, and gathered; beyond, it does not pay."""


class WaveFt(PeftReader):
    peft_type = "WAVEFT"
    title = "WaveFT"
    source = "`waveft_spectrum`; positions from `random_loc_seed`"
    delta = "`scaling · idwt(S)`, or `scaling · S`"
    term = "sparse, L² entries a coefficient (L the filter's length: 2 for db1); low rank where these are too many"
    limits = "wavelets other than db1 to db10; a generator that draws other positions; an error above the limit"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **SELECTION_FIELDS,
        "n_frequency": COUNT,
        "n_frequency_pattern": COUNT_PATTERN,
        "proportional_parameters": SWITCH,
        "scaling": SCALING,
        "random_loc_seed": SEED,
        "wavelet_family": FieldRule("understood", one_of(*FAMILIES), "db1 to db10", "unsupported_feature"),
        "use_idwt": SWITCH,
        "bias": BIAS,
        "init_weights": FLAG,
    }

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._shares = self._counts()
        self._positions = Positions(int(self.config.get("random_loc_seed", DEFAULT_SEED)), self.linears, self._shares)

    def _counts(self) -> Mapping[str, int]:
        """Coefficients by linear. Shares by size add up to what equal ones do, but for rounding; no linear has none."""
        if not self.config.get("proportional_parameters", False):
            return {linear.name: count_of(self, linear) for linear in self.linears}
        sizes = {linear.name: linear.out_features * linear.in_features for linear in self.linears}
        total, budget = sum(sizes.values()), self.config["n_frequency"] * len(sizes)
        return {name: max(1, round(size / total * budget)) for name, size in sizes.items()}

    def check(self, findings: Findings) -> None:
        check_positions_of(self.config, self.where, self.linears, self._shares, findings)

    def _filter(self) -> Tensor | None:
        """float64 ``[L]``; None without the transform."""
        if not self.config.get("use_idwt", True):
            return None
        return low_pass(int(self.config.get("wavelet_family", "db1").removeprefix("db")))

    def _patch(self) -> int:
        """Entries that a coefficient adds."""
        low = self._filter()
        return 1 if low is None else len(low) ** 2

    def _is_sparse(self, linear: LinearSpec) -> bool:
        most = _LARGEST_SHARE * linear.out_features * linear.in_features
        return self._filter() is None or self._shares[linear.name] * self._patch() <= most

    def bound(self, linear: LinearSpec) -> int | None:
        return None if self._is_sparse(linear) else linear.narrow

    def num_entries(self, linear: LinearSpec) -> int:
        return self._shares[linear.name] * self._patch() if self._is_sparse(linear) else 0

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        return {"waveft_spectrum": TensorRule((self._shares[linear.name],))}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta | SparseDelta:
        spectrum, low = parts["waveft_spectrum"].float(), self._filter()
        rows, cols = self._positions.of(linear, len(spectrum))
        scaling = float(self.config.get("scaling", 25.0))
        shape = linear.out_features, linear.in_features

        def dense() -> Tensor:
            """PEFT's way: all quadrants through one transposed convolution."""
            if low is None:
                return torch.zeros(shape).index_put_((rows, cols), spectrum) * scaling
            return _inverse_step(spectrum, rows, cols, shape, low.float()) * scaling

        if not self._is_sparse(linear):
            return converted(linear, dense(), self.conversion, dense)
        entries = rows, cols, spectrum.double() * scaling
        if low is not None:
            entries = _patches(*entries, shape, low)
        at_row, at_col, values, _ = sort_entries(*entries, linear.in_features)
        return SparseDelta(linear.name, at_row, at_col, values.float(), dense=dense)


@lru_cache
def low_pass(order: int) -> Tensor:
    """The reconstruction low pass of Daubechies' wavelet with ``order`` vanishing moments, float64 ``[2 order]``.

    Its square is ``(1 - y)^order * sum_k C(order - 1 + k, k) y^k`` with ``y = sin²(w / 2)``; of each pair of roots the
    one inside the unit circle is taken (Daubechies, Ten Lectures on Wavelets, section 6.1).
    """
    weights = [math.comb(order - 1 + k, k) for k in range(order)]
    taps = torch.ones(1, dtype=torch.complex128)
    for root in _roots(weights):
        middle = 1 - 2 * root
        one, other = middle + torch.sqrt(middle**2 - 1), middle - torch.sqrt(middle**2 - 1)
        taps = _times(taps, torch.stack([torch.ones_like(one), -(one if one.abs() < 1 else other)]))
    for _ in range(order):
        taps = _times(taps, torch.ones(2, dtype=torch.complex128))
    return taps.real * (math.sqrt(2) / taps.real.sum())


def _roots(weights: list[int]) -> Tensor:
    """Complex roots of ``sum_k weights[k] y^k``: eigenvalues of the companion matrix."""
    degree = len(weights) - 1
    companion = torch.zeros(degree, degree, dtype=torch.float64)
    if degree:
        companion[1:, :-1] = torch.eye(degree - 1, dtype=torch.float64)
        companion[:, -1] = -torch.tensor(weights[:-1], dtype=torch.float64) / weights[-1]
    return torch.linalg.eigvals(companion)


def _times(one: Tensor, other: Tensor) -> Tensor:
    """Product of two polynomials."""
    total = torch.zeros(len(one) + len(other) - 1, dtype=one.dtype)
    for index, factor in enumerate(other):
        total[index : index + len(one)] += factor * one
    return total


def _high_pass(low: Tensor) -> Tensor:
    return low.flip(0) * torch.tensor([1.0, -1.0], dtype=low.dtype).repeat(len(low) // 2)


def _padded(size: int, length: int) -> int:
    """Rows (or columns) of the matrix of coefficients: an even number."""
    return (size + length - 2 + 1) // 2 * 2


def _inverse_step(spectrum: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, int], low: Tensor) -> Tensor:
    """float32 ``[out, in]``."""
    length, high = len(low), _high_pass(low)
    height, width = (_padded(size, length) for size in shape)
    grid = torch.zeros(height, width)
    grid[rows + (height - shape[0]) // 2, cols + (width - shape[1]) // 2] = spectrum
    top, bottom = grid.chunk(2)
    quadrants = torch.stack([*top.chunk(2, dim=1), *bottom.chunk(2, dim=1)])
    filters = torch.stack([torch.outer(*pair) for pair in ((low, low), (high, low), (low, high), (high, high))])
    whole = F.conv_transpose2d(quadrants[None], filters[:, None], stride=2)[0, 0]
    inner = whole[length - 2 : whole.shape[0] - (length - 2), length - 2 : whole.shape[1] - (length - 2)]
    start = [(found - wanted) // 2 for found, wanted in zip(inner.shape, shape, strict=True)]
    return inner[start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]]


def _patches(
    rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int], low: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of the delta, each position once: every coefficient's patch, summed where patches overlap."""
    length = len(low)
    both = torch.stack([low, _high_pass(low)])
    halves, places = [], []
    for index, size in ((rows, shape[0]), (cols, shape[1])):
        padded = _padded(size, length)
        moved = index + (padded - size) // 2
        half = moved // (padded // 2)
        halves.append(half)
        first = 2 * (moved - half * (padded // 2)) - (length - 2) - (padded - (length - 2) - size) // 2
        places.append(first[:, None] + torch.arange(length))
    # The row filter goes by the quadrant's column, the column filter by its row.
    weighted = values[:, None, None] * both[halves[1]][:, :, None] * both[halves[0]][:, None, :]
    at_row = places[0][:, :, None].expand_as(weighted)
    at_col = places[1][:, None, :].expand_as(weighted)
    inside = (at_row >= 0) & (at_row < shape[0]) & (at_col >= 0) & (at_col < shape[1])
    keys, group = (at_row[inside] * shape[1] + at_col[inside]).unique(return_inverse=True)
    sums = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, group, weighted[inside])
    return keys // shape[1], keys % shape[1], sums
