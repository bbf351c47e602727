"""Random dense differences and residual modules for operator tests, with float64 oracles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaserve_kernels import DenseEntry, DenseTables, ModuleEntry, ModuleTables, pack_bits, unpack_bits
from deltatest.kernel_cases import Parts, randn

PHI = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def full(out_features: int, in_features: int, seed: int, dtype: torch.dtype = torch.float32) -> DenseEntry:
    return DenseEntry(
        in_features, delta=randn(out_features, in_features, dtype=dtype, seed=seed, scale=in_features**-0.5)
    )


def packed(out_features: int, in_features: int, seed: int) -> DenseEntry:
    signs = pack_bits(randn(out_features, in_features, seed=seed) > 0)
    return DenseEntry(in_features, signs=signs, scale=randn(out_features, seed=seed + 1, scale=in_features**-0.5))


def matrix(entry: DenseEntry) -> Tensor:
    if entry.delta is not None:
        return entry.delta.double()
    if entry.signs is None or entry.scale is None:
        raise ValueError("an entry without numbers")
    return (2 * unpack_bits(entry.signs, entry.in_features).double() - 1) * entry.scale.double()[:, None]


def dense_expected(
    y: Tensor,
    x: Tensor,
    bindings: Sequence[Parts],
    tables: DenseTables,
    members: Sequence[tuple[int, int, int]],
    depth: float,
) -> Tensor:
    """float64 ``y`` plus every row's differences."""
    out = y.double().clone()
    for row, parts in enumerate(bindings):
        for slot, first, last in parts:
            for linear, start, stop in members:
                entry = tables.entry(linear, slot)
                if entry is not None:
                    change = matrix(entry) @ x[row].double()
                    out[row, start:stop] += (first + (last - first) * depth) * change
    return out


def module(
    size: int, rank: int, activation: str, seed: int, *, has_biases: bool = True, **options: object
) -> ModuleEntry:
    dtype = options.pop("dtype", torch.float32)
    down = randn(rank, size, dtype=dtype, seed=seed, scale=size**-0.5)
    up_t = randn(rank, size, dtype=dtype, seed=seed + 1, scale=rank**-0.5)
    biases = (randn(rank, seed=seed + 2), randn(size, seed=seed + 3)) if has_biases else (None, None)
    return ModuleEntry(down, up_t, *biases, activation, **options)


def modules_expected(
    y: Tensor, bindings: Sequence[Parts], tables: ModuleTables, point: int, depth: float, read: dict[int, Tensor]
) -> Tensor:
    """float64 ``y`` plus what each row's module at the point gives."""
    out = y.double().clone()
    for row, parts in enumerate(bindings):
        for slot, first, last in parts:
            entry = tables.entry(point, slot)
            if entry is None:
                continue
            x = (y if entry.reads < 0 else read[entry.reads])[row].double()
            middle = entry.down.double() @ x + (0 if entry.down_bias is None else entry.down_bias.double())
            change = PHI[entry.activation](middle) @ entry.up_t.double()
            change = change + (0 if entry.up_bias is None else entry.up_bias.double())
            out[row] += (first + (last - first) * depth) * change
    return out
