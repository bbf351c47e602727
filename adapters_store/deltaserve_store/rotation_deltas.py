"""Rotations of a linear's input or output that an adapter's files stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor


class RotationBlocks(NamedTuple):
    """One factor: a row vector is taken in the order ``order`` (int32 [n], None: as it is) and cut into blocks of b;
    block ``z`` becomes ``z + z @ changes[k]`` and goes back to its places.

    ``changes`` float32 [n / b, b, b], or [1, b, b] which all blocks share: a rotation less the identity, so that one
    that turns little loses nothing when it is rounded.
    """

    changes: Tensor
    order: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RotationDelta:
    """``y = W R(x) + b`` (side "input") or ``y = R(W x + b)`` ("output"), R the ``factors`` one after the other.

    ``out_scale`` [out] then multiplies the product of an input rotation, the base's bias not. ``turn`` is the same
    rotation by the method's own formula: float32 ``[out, in]`` -> the weight it makes of it, for the proof; on the
    output's side it takes any number of columns.
    """

    module: str
    side: Literal["input", "output"]
    factors: tuple[RotationBlocks, ...]
    turn: Callable[[Tensor], Tensor] = field(repr=False)
    out_scale: Tensor | None = None
