"""Rotations of a folded adapter, in the serving dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deltaserve.deltas.folded_file import FileDamaged
from deltaserve_kernels import RotationEntry, RotationFactor
from deltaserve_store.spec import LinearSpec

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")
MAX_FACTORS = 32


@dataclass(frozen=True, slots=True)
class RotationTerm:
    """A linear's input, for the base's product alone, or that product with the base's bias in it, is turned by
    ``factors`` one after the other. Blocks are the rotation less the identity, in the serving dtype.
    """

    side: Side
    factors: RotationEntry

    def tensors(self) -> dict[str, Tensor]:
        """By the roles they have in a folded file."""
        named = {f"{self.side}_blocks.{at}": factor.blocks for at, factor in enumerate(self.factors)}
        orders = {f"{self.side}_order.{at}": factor.order for at, factor in enumerate(self.factors)}
        return named | {role: order for role, order in orders.items() if order is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def take_rotations(
    linear: str, roles: dict[str, Tensor], known: LinearSpec, dtype: torch.dtype
) -> tuple[RotationTerm, ...]:
    """The rotations among a linear's tensors of a folded file, taken out of ``roles``. Raises ``FileDamaged``.

    An order that is none would make an operator read foreign memory, so every one is checked.
    """
    terms: list[RotationTerm] = []
    for side in SIDES:
        width = known.in_features if side == "input" else known.out_features
        factors: list[RotationFactor] = []
        while len(factors) < MAX_FACTORS and (blocks := roles.pop(f"{side}_blocks.{len(factors)}", None)) is not None:
            order = roles.pop(f"{side}_order.{len(factors)}", None)
            _check(linear, blocks, order, width, dtype)
            factors.append(RotationFactor(blocks, order))
        if factors:
            terms.append(RotationTerm(side, tuple(factors)))
    return tuple(terms)


def _check(linear: str, blocks: Tensor, order: Tensor | None, width: int, dtype: torch.dtype) -> None:
    count, size = blocks.shape[:2] if blocks.dim() == 3 else (0, 1)
    if tuple(blocks.shape) != (count, size, size) or size < 1 or width % size or count not in (1, width // size):
        raise FileDamaged(f"{linear!r} has blocks {tuple(blocks.shape)} for {width} features")
    if blocks.dtype != dtype:
        raise FileDamaged(f"{linear!r} has blocks of {blocks.dtype}, not {dtype}")
    if order is None:
        return
    if order.dtype != torch.int32 or not torch.equal(order.sort().values, torch.arange(width, dtype=torch.int32)):
        raise FileDamaged(f"{linear!r} has an order that is none of its {width} features")
