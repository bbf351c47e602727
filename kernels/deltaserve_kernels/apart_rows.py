"""Dense differences and residual modules of a step told by tables alone: nothing asks the host which rows have some.

The form that Triton's operators run in, eagerly and in captured graphs: every launch covers the rows of a list, and a
row whose parts have no entry keeps its bits. The numbers are those of ``ApartStep``'s way, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from deltaserve_kernels import apart_rows_reference
from deltaserve_kernels.apart_family import ApartFamily, ApartStep, split_apart
from deltaserve_kernels.backend import implementation, select
from deltaserve_kernels.base_weight import ReadWeight
from deltaserve_kernels.checks import Member
from deltaserve_kernels.worklist import Run, WorkList, build_work_list_runs


@dataclass(frozen=True)
class ApartRows:
    """Rows of a step that may have such terms. A binding has at most one module at an attach point.

    work:  eagerly the rows that have some, among the step's rows; captured, the step's whole padded list
    slots: those of the list, where the host knows them; None in a captured pass, which is to serve any
    """

    family: ApartFamily
    work: WorkList
    slots: frozenset[int] | None = None

    def may_differ(self, members: Sequence[Member]) -> bool:
        """Whether some row may have a difference of these linears' weights."""
        entry = self.family.dense.entry
        return self.slots is None or any(entry(linear, slot) for linear, _, _ in members for slot in self.slots)

    def may_have_module(self, point: int) -> bool:
        """Whether some row may have a module at an attach point."""
        entry = self.family.modules.entry
        return self.slots is None or any(entry(point, slot) for slot in self.slots)


def split_apart_rows(
    runs: Sequence[Run], num_rows: int, family: ApartFamily, device: torch.device | str = "cpu"
) -> ApartStep | ApartRows | None:
    """The rows with such terms among the runs of a step, in the form that the device's operators take; None: no row.

    A binding of several adapters with modules is left to the definition: they run one after another.
    """
    chosen = [
        run for run in runs if run[1] and any(family.has_slot(s) and (first or last) for s, first, last in run[2])
    ]
    if not chosen:
        return None
    slots = frozenset(slot for run in chosen for slot, *_ in run[2])
    if select(device) != "triton" or any(shares_points(family, [part[0] for part in run[2]]) for run in chosen):
        return split_apart(runs, family, device)
    return ApartRows(family, build_work_list_runs(chosen, num_rows, device), slots)


def shares_points(family: ApartFamily, slots: Sequence[int]) -> bool:
    """Whether several of a binding's slots may have a module at one point."""
    return len(slots) > 1 and sum(map(family.modules.has_slot, slots)) > 1


def _implementation(device: torch.device) -> ModuleType:
    return implementation(device, None, definition=apart_rows_reference)


def dense_rows(
    y: Tensor, x: Tensor, step: ApartRows, members: Sequence[Member], depth: float, weight: ReadWeight | None = None
) -> None:
    """``y[row, start:stop] += sum over parts of scale * (Q x[row])`` in place.

    y [T, N], x [T, K] of one float dtype, that of the matrices. fp32 sums, rounded once; a part at scale 0 adds
    nothing, to the bit. A row's result depends on nothing but that row and its binding. ``weight``: the group's own, a
    matrix, which masks read. Raises a KernelError.
    """
    _implementation(y.device).dense_linear(y, x, step.work, step.family.dense, members, depth, weight)


def module_rows(y: Tensor, step: ApartRows, point: int, depth: float, read: Mapping[int, Tensor]) -> None:
    """``y[row] += scale * module(its input)`` in place, rounded once, where a row has a module at ``point``.

    y [T, H] of the modules' dtype. ``read[other point]`` [T, H]: the step's rows at another point that modules read.
    Raises a KernelError.
    """
    _implementation(y.device).add_modules(y, step.work, step.family.modules, point, depth, read)


def set_module_rows_aside(y: Tensor, step: ApartRows, point: int) -> Tensor:
    """Make rows of ``y`` [T, H] with a module at ``point`` 0 and return them, [R, H] in the order of the list: what is
    added to ``y`` from here on is such a row's own. Other rows stay; what is returned for them means nothing."""
    return _implementation(y.device).set_module_rows_aside(y, step.work, step.family.modules, point)


def put_module_rows_back(y: Tensor, kept: Tensor, step: ApartRows, point: int) -> None:
    """Add to rows of ``y`` what ``set_module_rows_aside`` kept of them, rounded once."""
    _implementation(y.device).put_module_rows_back(y, kept, step.work, step.family.modules, point)
