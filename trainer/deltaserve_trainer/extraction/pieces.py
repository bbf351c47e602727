"""The parts that plans are made of: for every linear the longest factors and the most entries that some plan takes.

Singular vectors and entries are ordered by what they are worth, so a smaller plan takes the beginning of a larger one's
and each matrix is decomposed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from deltaserve_trainer.extraction.plan import Form, Plan
from deltaserve_trainer.merging.low_rank import Factors
from deltaserve_trainer.merging.update import Entries, LinearUpdate, Update


class Pieces:
    """``matrix(name)`` makes a linear's delta [out, in], float32. Numbers are kept in ``dtype``."""

    def __init__(self, plans: Sequence[Plan], matrix: Callable[[str], Tensor], dtype: torch.dtype) -> None:
        self._factors: dict[str, Factors] = {}
        self._entries: dict[str, tuple[Tensor, Tensor]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        for name in dict.fromkeys(name for plan in plans for name in plan.choices):
            delta = matrix(name)
            self._shapes[name] = (delta.shape[0], delta.shape[1])
            if rank := _largest(plans, name, "low rank"):
                u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
                root = s[:rank].sqrt()
                a, b = root[:, None] * v[:rank], u[:, :rank] * root
                self._factors[name] = Factors(a.to(dtype).contiguous(), b.to(dtype).contiguous())
            if count := _largest(plans, name, "sparse"):
                keys = delta.flatten().abs().topk(count).indices
                self._entries[name] = keys, delta.flatten()[keys].to(dtype)

    def update(self, plan: Plan, biases: Mapping[str, Tensor], norms: Mapping[str, Mapping[str, Tensor]]) -> Update:
        """The approximation that a plan means, with the vectors that every plan takes whole."""
        linears: dict[str, LinearUpdate] = {}
        for name, choice in plan.choices.items():
            if choice.form == "low rank":
                found = self._factors[name]
                factors = Factors(found.a[: choice.size].clone(), found.b[:, : choice.size].clone())
                linears[name] = LinearUpdate(self._shapes[name], factors=factors)
            else:
                keys, values = (part[: choice.size] for part in self._entries[name])
                order = keys.argsort()
                linears[name] = LinearUpdate(self._shapes[name], entries=Entries(keys[order], values[order]))
        for name, bias in biases.items():
            change = linears.get(name) or LinearUpdate(self._shapes.get(name, (len(bias), 0)))
            linears[name] = LinearUpdate(change.shape, change.factors, change.entries, {"bias": bias})
        return Update(linears, norms)


def _largest(plans: Sequence[Plan], name: str, form: Form) -> int:
    choices = [plan.choices[name] for plan in plans if name in plan.choices]
    return max((choice.size for choice in choices if choice.form == form), default=0)
