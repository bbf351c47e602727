"""Public operators of terms that are computed apart. On a CPU they have C++ twins; elsewhere runs the definition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

from torch import Tensor

from deltaserve_kernels import apart_reference
from deltaserve_kernels.apart_family import ApartStep
from deltaserve_kernels.backend import select
from deltaserve_kernels.base_weight import ReadWeight
from deltaserve_kernels.checks import Member


def _implementation(y: Tensor, backend: str | None) -> ModuleType:
    if y.device.type == "cpu" and select(y.device, backend) == "cpu":
        from deltaserve_kernels.cpu import apart

        return apart
    return apart_reference


def dense_linear(
    y: Tensor,
    x: Tensor,
    step: ApartStep,
    members: Sequence[Member],
    depth: float,
    weight: ReadWeight | None = None,
    *,
    backend: str | None = None,
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (Q x[row])`` in place, for every member and row of the step.

    y [T, N], x [T, K] of one float dtype, that of the matrices. fp32 sums, parts added in binding order, rounded once;
    parts at scale 0 add nothing, to the bit. A row's result depends on nothing but that row and its binding.
    ``weight``: the group's own, whose row ``start`` is the member's first; asked for where a row has a mask. Raises a
    KernelError (ValueError).
    """
    if step.family.dense.has_any_of(members):
        _implementation(y, backend).dense_linear(y, x, step, members, depth, weight)


def add_modules(
    y: Tensor,
    step: ApartStep,
    point: int,
    depth: float,
    read: Mapping[int, Tensor],
    *,
    backend: str | None = None,
) -> None:
    """``y[row] += scale * module(its input)`` in place, for every row of the step that has a module at ``point``.

    y [T, H] of the modules' dtype. Modules of several parts run in binding order, in fp32 and rounded once at the end:
    one that reads the point it is added at sees what those before it added. ``read[other point]`` [T, H] is what the
    step's rows were at another point that modules read. Raises a KernelError (ValueError).
    """
    if step.family.modules.has_any(point):
        _implementation(y, backend).add_modules(y, step, point, depth, read)
