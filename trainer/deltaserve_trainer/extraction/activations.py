"""What a linear is fed: second moments of its inputs, so that an error counts by what it does to outputs.

Over the tokens of a text, ``E |E x|^2 = |E C^(1/2)|^2`` with ``C = E[x x']`` for any error E of a weight. The nearest
matrix of low rank in that sense comes from the singular values of ``dW L``, ``L L' = C``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAX_WIDTH = 4096
"""Wider inputs get the diagonal of C alone: the matrix would be larger than the weight."""
RIDGE = 0.2
"""Share of what all inputs get alike: a short text does not tell of everything."""


@dataclass(slots=True)
class Moments:
    """Of inputs [in]: ``diagonal`` float64 [in] and, up to ``MAX_WIDTH``, ``matrix`` float64 [in, in], sums over
    ``num_tokens`` tokens."""

    diagonal: Tensor
    matrix: Tensor | None
    num_tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Inputs [..., in]."""
        flat = x.detach().reshape(-1, x.shape[-1]).double()
        self.num_tokens += len(flat)
        self.diagonal += flat.square().sum(0)
        if self.matrix is not None:
            self.matrix += flat.t() @ flat

    def measure(self) -> Measure:
        """Scaled so that the mean input counts as much as a number counts in plain squares: which errors of one linear
        matter is known from its inputs, but not how much its outputs matter beside those of another. Raises
        ``ValueError`` when there was no token."""
        if not self.num_tokens:
            raise ValueError("no token reached this linear")
        scale = (1 - RIDGE) / (float(self.diagonal.mean()) or 1.0)
        diagonal = self.diagonal * scale + RIDGE
        if self.matrix is None:
            return Measure(diagonal, None)
        matrix = self.matrix * scale + RIDGE * torch.eye(len(diagonal), dtype=torch.float64)
        return Measure(diagonal, torch.linalg.cholesky(matrix))


@dataclass(frozen=True, slots=True)
class Measure:
    """How errors of a linear [out, in] are counted: ``|E L|^2``. ``diagonal`` float64 [in] of ``L L'``; ``root`` is L,
    lower triangular float64 [in, in], or None where L is diagonal too."""

    diagonal: Tensor
    root: Tensor | None

    @classmethod
    def plain(cls, width: int) -> Measure:
        """Every number counts alike."""
        return cls(torch.ones(width, dtype=torch.float64), None)

    def rooted(self, rows: Tensor) -> Tensor:
        """``rows @ L``, float64."""
        return rows.double() * self.diagonal.sqrt() if self.root is None else rows.double() @ self.root

    def unrooted(self, rows: Tensor) -> Tensor:
        """``rows @ L^-1``, float64."""
        if self.root is None:
            return rows / self.diagonal.sqrt()
        return torch.linalg.solve_triangular(self.root, rows, upper=False, left=False)

    def squares(self, delta: Tensor) -> float:
        return float(self.rooted(delta).square().sum())


def moments_of(
    models: Sequence[tuple[nn.Module, Mapping[str, nn.Module]]], prompts: Sequence[Sequence[int]]
) -> dict[str, Moments]:
    """By the names of the linears, which every model is given with; linears that are fed one tensor share an object.

    Of the base and the fine-tune both: an adapter is served with inputs like the fine-tune's where little is left, and
    like the base's where much is.
    """
    found: dict[str, Moments] = {}
    for model, linears in models:
        _add_moments(found, model, linears, prompts)
    return found


@torch.no_grad()
def _add_moments(
    found: dict[str, Moments], model: nn.Module, linears: Mapping[str, nn.Module], prompts: Sequence[Sequence[int]]
) -> None:
    last: list[tuple[Tensor, Moments]] = []

    def note(name: str, x: Tensor) -> None:
        if last and last[0][0] is x:
            found.setdefault(name, last[0][1])
            if found[name] is last[0][1]:
                return
        width = x.shape[-1]
        if name not in found:
            matrix = torch.zeros(width, width, dtype=torch.float64) if width <= MAX_WIDTH else None
            found[name] = Moments(torch.zeros(width, dtype=torch.float64), matrix)
        found[name].add(x)
        last[:] = [(x, found[name])]

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name, module in linears.items()
    ]
    try:
        for ids in prompts:
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
