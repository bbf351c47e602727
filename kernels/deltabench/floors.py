"""The least time that a decode step, a linear, or its adapters can take: bytes and flops over measured rates.

Base: every linear reads its weight, x, and writes y; time is the larger of bytes and flops. Adapters: their own bytes,
x read once per fused linear, y read and written, for the rows that have an adapter. Rates are measured in the same run
(``rates.py``); nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A 16-bit value, a 16-bit column and little else: what one nonzero of a jagged delta costs.
BYTES_PER_NONZERO = 4.2


@dataclass(frozen=True)
class Rates:
    """``copy``: bytes per second of a device-to-device copy, read and written both counted. ``gemm``: flop per second
    of a large matrix product on random data."""

    copy: float
    gemm: float

    def seconds(self, num_bytes: float, flops: float = 0.0) -> float:
        return max(num_bytes / self.copy, flops / self.gemm)


@dataclass(frozen=True)
class FusedLinear:
    """Linears that read one x: ``x [T, in_features] -> y [T, sum(widths)]``."""

    name: str
    in_features: int
    widths: tuple[int, ...]

    @property
    def out_features(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True)
class ModelShape:
    """A dense Llama-like decoder; ``itemsize`` bytes per number."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    itemsize: int = 2

    @property
    def groups(self) -> tuple[FusedLinear, ...]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            FusedLinear("qkv", self.hidden, (q, kv, kv)),
            FusedLinear("o", q, (self.hidden,)),
            FusedLinear("gate_up", self.hidden, (self.intermediate, self.intermediate)),
            FusedLinear("down", self.intermediate, (self.hidden,)),
        )

    def group(self, name: str) -> FusedLinear:
        return next(group for group in self.groups if group.name == name)

    @property
    def kv_bytes_per_position(self) -> int:
        """K and V of one position in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.itemsize


LLAMA_8B = ModelShape(4096, 14336, 32, 8, 128, 32, 128256)


def linear_seconds(in_features: int, out_features: int, rows: int, rates: Rates, itemsize: int = 2) -> float:
    """One base linear over ``rows`` rows."""
    num_bytes = (in_features * out_features + rows * (in_features + out_features)) * itemsize
    return rates.seconds(num_bytes, 2.0 * rows * in_features * out_features)


def base_seconds(group: FusedLinear, rows: int, rates: Rates, itemsize: int = 2) -> float:
    """The base's linears of one group, each on its own (x is read by each)."""
    return sum(linear_seconds(group.in_features, width, rows, rates, itemsize) for width in group.widths)


def activation_bytes(group: FusedLinear, rows: int, itemsize: int = 2) -> int:
    """x read once, y read and written."""
    return rows * (group.in_features + 2 * group.out_features) * itemsize


def lora_weight_bytes(group: FusedLinear, ranks: Sequence[int], itemsize: int = 2) -> int:
    """A and B of adapters with these ranks, on every linear of the group."""
    return sum(ranks) * sum(group.in_features + width for width in group.widths) * itemsize


def lora_bytes(group: FusedLinear, rows: int, ranks: Sequence[int], itemsize: int = 2) -> int:
    """All bytes of the low-rank terms of ``rows`` rows that use adapters of these ranks, each adapter once."""
    return lora_weight_bytes(group, ranks, itemsize) + activation_bytes(group, rows, itemsize)


def lora_seconds(group: FusedLinear, rows: int, ranks: Sequence[int], rates: Rates, itemsize: int = 2) -> float:
    """Rows are spread evenly over the adapters."""
    mean_rank = sum(ranks) / len(ranks)
    flops = 2.0 * rows * mean_rank * sum(group.in_features + width for width in group.widths)
    return rates.seconds(lora_bytes(group, rows, ranks, itemsize), flops)


def nonzeros(in_features: int, out_features: int, density: float) -> int:
    return round(in_features * out_features * density)


def sparse_bytes(
    group: FusedLinear, rows: int, adapters: int, density: float, itemsize: int = 2, per_nonzero: float | None = None
) -> float:
    """Like ``lora_bytes`` for unstructured sparse deltas; a 16-bit nonzero costs ``BYTES_PER_NONZERO``."""
    entry = BYTES_PER_NONZERO + (itemsize - 2) if per_nonzero is None else per_nonzero
    count = sum(nonzeros(group.in_features, width, density) for width in group.widths)
    return adapters * count * entry + activation_bytes(group, rows, itemsize)


def layer_base_seconds(shape: ModelShape, rows: int, rates: Rates) -> float:
    """The linears of one layer."""
    return sum(base_seconds(group, rows, rates, shape.itemsize) for group in shape.groups)


def step_base_seconds(shape: ModelShape, rows: int, rates: Rates, head_rows: int | None = None) -> float:
    """The linears of all layers and the head (over ``head_rows``, all by default): no attention, no KV."""
    head_rows = rows if head_rows is None else head_rows
    head = linear_seconds(shape.hidden, shape.vocab, head_rows, rates, shape.itemsize)
    return shape.layers * layer_base_seconds(shape, rows, rates) + head


def step_kv_seconds(shape: ModelShape, rows: int, context: int, rates: Rates) -> float:
    """Reading the KV of ``context`` positions for each of ``rows`` sequences."""
    return rows * context * shape.kv_bytes_per_position / rates.copy


def layer_lora_seconds(
    shape: ModelShape, rows: int, ranks: Sequence[int], rates: Rates, groups: Sequence[str] | None = None
) -> float:
    """Low-rank terms on every linear of one layer, or of the groups named."""
    return sum(
        lora_seconds(group, rows, ranks, rates, shape.itemsize)
        for group in shape.groups
        if groups is None or group.name in groups
    )


def layer_sparse_seconds(shape: ModelShape, rows: int, adapters: int, density: float, rates: Rates) -> float:
    return sum(sparse_bytes(group, rows, adapters, density, shape.itemsize) / rates.copy for group in shape.groups)
