"""What a merge is asked to do, and which option belongs to which method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from deltaserve_trainer.errors import MergeRefused

USES: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "linear": frozenset({"weights"}),
        "soup": frozenset(),
        "greedy-soup": frozenset({"data"}),
        "ties": frozenset({"weights", "density", "form"}),
        "dare": frozenset({"weights", "density", "seed", "form"}),
        "model-stock": frozenset(),
        "lines": frozenset({"weights", "alpha", "beta"}),
        "negmerge": frozenset({"scale", "form"}),
        "ema": frozenset({"momentum"}),
    }
)
"""Options of each method besides ``rank`` and ``dtype``, which all have."""
FEWEST = {"linear": 1, "lines": 1, "dare": 1, "ties": 2, "negmerge": 2, "model-stock": 2}
ELEMENTWISE = frozenset({"ties", "dare", "negmerge"})
FORMS = ("auto", "lora", "sparse")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """None stands for the method's own default. ``form`` is what an elementwise result becomes; ``rank`` bounds the
    low-rank part of any result. Raises ``MergeRefused`` for what the method does not know or cannot be.
    """

    method: str
    weights: tuple[float, ...] | None = None
    density: float | None = None
    seed: int | None = None
    scale: float | None = None
    alpha: float | None = None
    beta: float | None = None
    momentum: float | None = None
    data: str | None = None
    form: str | None = None
    rank: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.method not in USES:
            raise MergeRefused(f"--method {self.method}: choose one of {', '.join(USES)}")
        for option in sorted(frozenset().union(*USES.values()) - USES[self.method]):
            if getattr(self, option) is not None:
                users = ", ".join(name for name, used in USES.items() if option in used)
                raise MergeRefused(f"--{option} is no option of {self.method}; it belongs to {users}")
        if self.form is not None and self.form not in FORMS:
            raise MergeRefused(f"--form {self.form}: choose one of {', '.join(FORMS)}")
        if self.dtype not in DTYPES:
            raise MergeRefused(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        if self.rank is not None and not 1 <= self.rank <= 1024:
            raise MergeRefused(f"--rank {self.rank}: it is between 1 and 1024")
        if self.density is not None and not 0 < self.density <= 1:
            raise MergeRefused(f"--density {self.density:g}: it is above 0 and at most 1, the share of numbers kept")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise MergeRefused(f"--momentum {self.momentum:g}: it is at least 0 and below 1")
        numbers = (*(self.weights or ()), *(x for x in (self.scale, self.alpha, self.beta) if x is not None))
        if not all(map(math.isfinite, numbers)):
            raise MergeRefused("weights, scale, alpha and beta are finite numbers")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise MergeRefused(f"--seed {self.seed}: it is at least 0 and below 2^63")
        if self.method == "greedy-soup" and self.data is None:
            raise MergeRefused("greedy-soup chooses its ingredients by held-out loss: give --data")

    def check_count(self, count: int) -> None:
        """``count`` adapters are given."""
        fewest = FEWEST.get(self.method, 2)
        if count < fewest:
            raise MergeRefused(f"{self.method} takes at least {fewest} adapters; {count} given")
        if self.weights is not None and len(self.weights) != count:
            raise MergeRefused(f"{len(self.weights)} weights for {count} adapters; give one in --weights for each")

    def weights_for(self, count: int) -> tuple[float, ...]:
        """Of linear, ties, dare and lines: what was given, else 1 each (task arithmetic)."""
        return self.weights if self.weights is not None else (1.0,) * count

    def told(self) -> str:
        """The method with its options, as provenance has it."""
        parts = [
            f"{name} {getattr(self, name)}"
            for name in ("density", "seed", "scale", "alpha", "beta", "momentum", "form", "rank")
            if getattr(self, name) is not None
        ]
        return " ".join([self.method, *parts])
