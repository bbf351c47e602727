"""Random masks over a group's weight for operator tests, and what they take out in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve_kernels import ApartEntries, ApartFamily, DenseEntry, WeightView, cpu, pack_bits
from deltatest.apart_cases import full, matrix, packed
from deltatest.kernel_cases import Parts, randn

Members = Sequence[tuple[int, int, int]]


def mask(out_features: int, in_features: int, seed: int, share: float = 0.3) -> DenseEntry:
    generator = torch.Generator().manual_seed(seed)
    return DenseEntry(in_features, mask=pack_bits(torch.rand(out_features, in_features, generator=generator) < share))


def weight_of(outputs: int, inputs: int, dtype: torch.dtype = torch.float32, seed: int = 90) -> WeightView:
    return WeightView(randn(outputs, inputs, dtype=dtype, seed=seed), outputs)


def in_panels(view: WeightView) -> WeightView:
    """The same weight as the C++ operators reorder it."""
    return WeightView(cpu.pack_weight(view.data), view.outputs)


def filled(
    widths: Sequence[int], inputs: int, first: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[ApartFamily, Members]:
    """Slots 0 and 1 with masks of every linear; 2: a matrix, signs, a mask by turns; 3: nothing. (family, members)."""
    family, members, start = ApartFamily(len(widths), 0, 4), [], first
    for linear, width in enumerate(widths):
        members.append((linear, start, start + width))
        start += width
    for slot in range(3):
        entries = []
        for linear, width in enumerate(widths):
            other = [full(width, inputs, 7 + linear, dtype), packed(width, inputs, 8), None][linear % 3]
            own = mask(width, inputs, 10 * slot + linear)
            entries.append((linear, other if slot == 2 and other is not None else own))
        family.set_all(slot, ApartEntries(tuple(entries)))
    return family, tuple(members)


def expected(
    y: Tensor, x: Tensor, bindings: Sequence[Parts], family: ApartFamily, members: Members, depth: float, base: Tensor
) -> Tensor:
    """float64 ``y`` plus every row's differences; the weight is read bit by bit."""
    out = y.double().clone()
    for row, parts in enumerate(bindings):
        for slot, first, last in parts:
            for linear, start, stop in members:
                entry = family.dense.entry(linear, slot)
                if entry is None:
                    continue
                if entry.mask is None:
                    change = matrix(entry)
                else:
                    change = torch.zeros(stop - start, x.shape[1], dtype=torch.float64)
                    for n, words in enumerate(entry.mask.tolist()):
                        for k in range(x.shape[1]):
                            if words[k // 32] >> k % 32 & 1:
                                change[n, k] = -float(base[start + n, k])
                out[row, start:stop] += (first + (last - first) * depth) * (change @ x[row].double())
    return out
