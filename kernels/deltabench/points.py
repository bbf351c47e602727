"""Which batches are measured: rows, adapters, ranks, slots. The names are those of the tables."""

from __future__ import annotations

from dataclasses import dataclass

from deltabench.floors import LLAMA_8B, ModelShape

DENSITY = 0.005


@dataclass(frozen=True)
class Point:
    """``rows`` rows spread evenly over ``adapters`` adapters (row i has adapter i modulo their number), which lie in
    the first of ``slots`` slots. ``ranks`` repeat over the adapters."""

    name: str
    rows: int
    adapters: int
    ranks: tuple[int, ...]
    slots: int = 0

    @property
    def all_ranks(self) -> tuple[int, ...]:
        return tuple(self.ranks[slot % len(self.ranks)] for slot in range(self.adapters))

    @property
    def num_slots(self) -> int:
        return max(self.slots, self.adapters)

    def describe(self) -> dict[str, object]:
        return {
            "point": self.name,
            "T": self.rows,
            "G": self.adapters,
            "ranks": sorted(set(self.ranks)),
            "slots": self.num_slots,
        }


def uniform(rows: int, adapters: int, rank: int, slots: int = 0) -> Point:
    name = f"({rows},{adapters},{rank})" + (f" of {slots} slots" if slots else "")
    return Point(name, rows, adapters, (rank,), slots)


MIXED = Point("(64,64,8..64)", 64, 64, (8, 16, 32, 64))
EQUAL_BYTES = uniform(64, 64, 30)  # the mean rank of MIXED: the same bytes in one rank
FEW_ACTIVE = uniform(64, 8, 16, slots=64)
DECODE_POINTS = (
    uniform(64, 64, 16),
    uniform(1, 1, 16),
    uniform(16, 16, 16),
    uniform(64, 64, 64),
    uniform(256, 32, 16),
    uniform(256, 256, 16),
)
PREFILL_POINT = uniform(4096, 8, 16)
# In the order of measuring: when time runs out, the last ones go unmeasured.
LORA_POINTS = (*DECODE_POINTS, FEW_ACTIVE, MIXED, EQUAL_BYTES, PREFILL_POINT)
SPARSE_POINTS = (
    uniform(64, 64, 0),
    uniform(1, 1, 0),
    uniform(256, 256, 0),
    uniform(256, 32, 0),
    uniform(4096, 8, 0),
)
STEP_POINTS = (
    uniform(1, 1, 16),
    uniform(16, 16, 16),
    uniform(64, 64, 16),
    uniform(256, 32, 16),
    uniform(64, 64, 64),
)
STEP_CONTEXT = 128  # positions of each sequence

# The same list, small enough for Triton's interpreter.
TINY = ModelShape(hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, layers=2, vocab=256)
TINY_LORA_POINTS = (Point("(3,2,8..16)", 3, 2, (8, 16), 3),)
TINY_SPARSE_POINTS = (uniform(4, 2, 0),)
TINY_STEP_POINTS = (uniform(4, 2, 8),)
TINY_CONTEXT = 20


@dataclass(frozen=True)
class Plan:
    """All that a run measures."""

    shape: ModelShape
    lora: tuple[Point, ...]
    sparse: tuple[Point, ...]
    step: tuple[Point, ...]
    context: int
    density: float
    layers: int  # each with weights of its own, in one pass
    rounds: int


FULL = Plan(LLAMA_8B, LORA_POINTS, SPARSE_POINTS, STEP_POINTS, STEP_CONTEXT, DENSITY, layers=8, rounds=20)
DRY = Plan(TINY, TINY_LORA_POINTS, TINY_SPARSE_POINTS, TINY_STEP_POINTS, TINY_CONTEXT, 0.05, layers=1, rounds=1)
