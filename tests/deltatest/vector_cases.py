"""Random vector terms for operator tests, with float64 oracles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve_kernels import NormTables, VectorTables
from deltatest.block_cases import afloat
from deltatest.kernel_cases import LinearCase, Parts, randn

NAN = float("nan")


class VectorCase(LinearCase):
    """A ``LinearCase`` with scales and biases beside its low-rank terms; vectors lie in seas of NaN."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vectors = VectorTables(self.lora.num_linears, self.num_slots)
        self.given: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = {}

    def add_vectors(self, slot: int, has_scale: bool, has_bias: bool, linears: Sequence[int] | None = None) -> None:
        for linear, start, stop in self.members:
            if linears is None or linear in linears:
                seed = 3000 + 100 * slot + linear
                scale = afloat(1 + randn(stop - start, seed=seed, scale=0.3), NAN) if has_scale else None
                bias = afloat(randn(stop - start, seed=seed + 50), NAN) if has_bias else None
                self.vectors.set(linear, slot, scale, bias)
                self.given[linear, slot] = scale, bias

    def expected_vectors(self, y: Tensor, x: Tensor, bindings: Sequence[Parts], depth: float) -> Tensor:
        """float64: every row's scales and biases, and its low-rank deltas."""
        delta = self.expected("lora", torch.zeros_like(y), x, bindings, depth)
        out = y.double()
        for row, parts in enumerate(bindings):
            for linear, start, stop in self.members:
                factor, shift = torch.ones(stop - start).double(), torch.zeros(stop - start).double()
                for slot, first, last in parts:
                    scale, bias = self.given.get((linear, slot), (None, None))
                    at = first + (last - first) * depth
                    factor = factor if scale is None else factor + at * (scale.double() - 1)
                    shift = shift if bias is None else shift + at * bias.double()
                out[row, start:stop] = out[row, start:stop] * factor + shift
        return out + delta


def norm_tables(size: int, num_norms: int, slots: Sequence[int], num_slots: int) -> NormTables:
    """Gains in seas of NaN for these slots, of each norm but the first."""
    tables = NormTables(num_norms, num_slots)
    for norm in range(1, num_norms):
        for slot in slots:
            tables.set(norm, slot, afloat(randn(size, seed=10 * slot + norm, scale=0.5), NAN))
    return tables


def expected_norm(
    x: Tensor, weight: Tensor, eps: float, tables: NormTables, norm: int, bindings: Sequence[Parts], depth: float
) -> Tensor:
    """float64, one row at a time."""
    rows = []
    for row, parts in zip(x.double(), bindings, strict=True):
        gain = weight.double()
        for slot, first, last in parts:
            entry = tables.get(norm, slot)
            if entry is not None:
                gain = gain + (first + (last - first) * depth) * entry[0].double()
        rows.append(row / (row.square().mean() + eps).sqrt() * gain)
    return torch.stack(rows) if rows else x.double()
