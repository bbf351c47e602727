"""Positions of trained coefficients that PEFT does not save: it draws them again from a seed, one permutation a linear.

``torch.randperm(out * in)`` with a CPU generator of its own, cut to the number of coefficients. The draw is repeated
only where this build's generator gives the numbers that it gave when this was written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import FieldRule, is_int, is_pattern
from deltaserve_store.formats.peft_kinds.reader import PeftReader
from deltaserve_store.spec import LinearSpec

MAX_POSITIONS = 1 << 27
"""Entries of the largest linear: beyond, PyTorch draws from another stretch of its generator, which is not checked."""
MAX_DRAWN = 1 << 29
"""Entries of all permutations of one adapter: a linear's size counts once, however many linears have it."""
_KNOWN_DRAW = (735, 967, 3096)
"""Items 0, 1 and 4099 of a permutation of 5000 with seed 777."""


def is_count(value: Any) -> bool:
    return is_int(value) and 1 <= value <= MAX_POSITIONS


COUNT = FieldRule("understood", is_count, f"an integer from 1 to {MAX_POSITIONS}", required=True)
COUNT_PATTERN = FieldRule(
    "understood", lambda value: is_pattern(value, is_count), "module paths to integers above 0", per_key=is_count
)
SCALING = FieldRule(
    "understood",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) <= 1e6,
    "a number other than 0, at most 1e6 in size",
)
DEFAULT_SEED = 777


def is_known_permutation() -> bool:
    """Whether seeds mean on this machine what they meant where the readers were written."""
    draw = torch.randperm(5000, generator=torch.Generator().manual_seed(777))
    return (int(draw[0]), int(draw[1]), int(draw[4099])) == _KNOWN_DRAW


class Positions:
    """Rows and columns of coefficients. Every permutation is drawn once: the number of coefficients only cuts it, so
    linears of one size share it, whatever their numbers (``counts``, by name)."""

    def __init__(self, seed: int, linears: Iterable[LinearSpec], counts: Mapping[str, int]) -> None:
        self._seed = seed
        self._most: dict[int, int] = {}
        for linear in linears:
            size = _size_of(linear)
            self._most[size] = max(self._most.get(size, 0), counts[linear.name])
        self._drawn: dict[int, Tensor] = {}

    def of(self, linear: LinearSpec, count: int) -> tuple[Tensor, Tensor]:
        """int64 ``[count]`` each, in the ``[out, in]`` orientation; no position twice."""
        size = _size_of(linear)
        if size not in self._drawn:
            generator = torch.Generator().manual_seed(self._seed)
            self._drawn[size] = torch.randperm(size, generator=generator)[: self._most[size]].clone()
        flat = self._drawn[size][:count]
        return flat // linear.in_features, flat % linear.in_features


def _size_of(linear: LinearSpec) -> int:
    return linear.out_features * linear.in_features


def check_positions_of(
    config: Mapping[str, Any],
    where: str,
    linears: tuple[LinearSpec, ...],
    counts: Mapping[str, int],
    findings: Findings,
) -> None:
    """What no single field shows: a generator that is known, permutations that are affordable together, and
    coefficients that find room in their linears."""
    if not is_known_permutation():
        allowed = "a build of PyTorch whose generator draws the positions that PEFT meant"
        findings.add(
            "seed_not_usable", f"{where}:random_loc_seed", config.get("random_loc_seed", DEFAULT_SEED), allowed
        )
    total = sum({_size_of(linear) for linear in linears})
    if total > MAX_DRAWN:
        found = f"permutations of {total} entries"
        findings.add("conversion_too_large", where, found, f"at most {MAX_DRAWN}: target linears of fewer sizes")
    for linear in linears:
        size = _size_of(linear)
        if size > MAX_POSITIONS:
            findings.add(
                "seed_not_usable", linear.name, f"{size} entries", f"linears of at most {MAX_POSITIONS} entries"
            )
        if counts[linear.name] > size:
            allowed = f"at most {size}, the entries of {linear.name}"
            findings.add("invalid_value", f"{where}:n_frequency", counts[linear.name], allowed)


def count_of(reader: PeftReader, linear: LinearSpec) -> int:
    """``n_frequency`` of one linear, patterns applied."""
    return int(reader.patterns("n_frequency_pattern").value_for(linear.name, reader.config["n_frequency"]))
