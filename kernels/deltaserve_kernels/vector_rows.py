"""Vector terms of a step told by tables alone: no operator here asks the host which rows have some.

The form that Triton's operators run in, eagerly and in captured graphs: every launch covers the rows of a list, and a
row whose parts have no entry keeps its bits. The numbers are those of ``VectorStep``'s way, row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from deltaserve_kernels import vector_rows_reference
from deltaserve_kernels.backend import implementation, select
from deltaserve_kernels.checks import Member
from deltaserve_kernels.pointer_tables import PointerTables
from deltaserve_kernels.rotation_tables import RotationTables
from deltaserve_kernels.vector_family import VectorFamily, VectorStep, split_runs
from deltaserve_kernels.worklist import Run, WorkList, build_work_list_runs


@dataclass(frozen=True)
class VectorRows:
    """Rows of a step that may have vectors.

    work:     eagerly the rows that have some, among the step's rows; captured, the step's whole padded list
    slots:    those of the list, where the host knows them; None in a captured pass, which is to serve any
    fans_out: whether groups of several linears give each the input that it wants, at the price of a product with more
              rows; a captured pass without it serves adapters that scale inputs of lone linears alone
    max_factors: factors of rotations that a captured pass has launches for; an eager one goes by its slots

    One part of a binding may turn rows, no more (``turns_twice``).
    """

    family: VectorFamily
    work: WorkList
    slots: frozenset[int] | None = None
    fans_out: bool = True
    max_factors: int = 0

    def may_have(self, tables: PointerTables, linears: Sequence[int]) -> bool:
        """Whether some row may have an entry for some of these: a captured pass never knows better."""
        if self.slots is None:
            return True
        return any(tables.mark(linear, slot) is not None for linear in linears for slot in self.slots)

    def num_factors(self, tables: RotationTables, linears: Sequence[int]) -> int:
        """How many factors rotations of these linears may have; 0: nothing is turned."""
        if self.slots is None:
            return self.max_factors
        found = (tables.factors(linear, slot) for linear in linears for slot in self.slots)
        return max((len(factors) for factors in found if factors is not None), default=0)


def turns_twice(family: VectorFamily, slots: Iterable[int]) -> bool:
    """Whether several adapters of one binding, by their slots, turn something."""
    return sum(family.num_factors(slot) > 0 for slot in slots) > 1


def split_vectors(
    runs: Sequence[Run], num_rows: int, family: VectorFamily, device: torch.device | str = "cpu"
) -> VectorStep | VectorRows | None:
    """The rows with vectors among the runs of a step, in the form that the device's operators take; None: no row."""
    chosen = [
        run for run in runs if run[1] and any(family.has_slot(s) and (first or last) for s, first, last in run[2])
    ]
    if not chosen:
        return None
    if select(device) != "triton":
        return split_runs(runs, num_rows, family, device)
    if any(turns_twice(family, [s for s, first, last in run[2] if first or last]) for run in chosen):
        return split_runs(runs, num_rows, family, device)
    slots = frozenset(slot for run in chosen for slot, *_ in run[2])
    return VectorRows(family, build_work_list_runs(chosen, num_rows, device), slots)


def _implementation(device: torch.device) -> ModuleType:
    return implementation(device, None, definition=vector_rows_reference)


def scaled_input(x: Tensor, step: VectorRows, linear: int, depth: float) -> Tensor:
    """``x`` [T, K] as one linear is fed it, a new tensor: ``x * (1 + sum of scale * (s - 1))`` where a row's parts have
    an input scale. Raises a KernelError."""
    return _implementation(x.device).scaled_input(x, step.work, step.family.inputs, linear, depth)


def fan_out(x: Tensor, step: VectorRows, members: Sequence[Member], depth: float) -> Tensor:
    """``x`` [T, K] -> [T + M * R, K]: x itself, then for each of M members the R listed rows as that one is fed them
    (see ``scaled_input``). Raises a KernelError."""
    return _implementation(x.device).fan_out(x, step.work, step.family.inputs, members, depth)


def gather_members(y: Tensor, step: VectorRows, members: Sequence[Member]) -> Tensor:
    """``y`` [T + M * R, N], the product of what ``fan_out`` gave, -> its first T rows, where a row with an input scale
    or rotation for a member has that member's columns from the row made for it. In place."""
    family = step.family
    return _implementation(y.device).gather_members(y, step.work, family.inputs, family.in_rotations, members)


def turn_rows(
    y: Tensor, x: Tensor, step: VectorRows, tables: RotationTables, members: Sequence[Member], depth: float
) -> None:
    """``y[row, start:stop] += scale * (R(x) - x)[row, start:stop]`` where a row has a part that turns it, as
    ``rotate_blocks``; in place. ``y`` [T, N] is another tensor than ``x`` [T, N]. Raises a KernelError."""
    if num_factors := step.num_factors(tables, [member[0] for member in members]):
        _implementation(x.device).turn_rows(y, x, step.work, tables, members, depth, num_factors)


def turn_fanned(fed: Tensor, x: Tensor, step: VectorRows, members: Sequence[Member], depth: float) -> None:
    """``turn_rows`` of what ``fan_out`` made of ``x`` [T, K]: each member's rows by its own rotation. In place."""
    tables, width = step.family.in_rotations, x.shape[1]
    num_listed = (len(fed) - len(x)) // len(members)
    if num_listed and (num_factors := step.num_factors(tables, [member[0] for member in members])):
        whole = [(member[0], 0, width) for member in members]
        _implementation(x.device).turn_rows(fed, x, step.work, tables, whole, depth, num_factors, num_listed)


def set_aside(y: Tensor, step: VectorRows) -> Tensor:
    """Make rows of ``y`` [T, N] whose parts have vectors 0 and return them, [R, N] in the order of the list: what is
    added to ``y`` from here on is such a row's own. Other rows stay; what is returned for them means nothing."""
    return _implementation(y.device).set_aside(y, step.work, step.family)


def put_back(y: Tensor, kept: Tensor, step: VectorRows) -> None:
    """Add to rows of ``y`` what ``set_aside`` kept of them, rounded once."""
    _implementation(y.device).put_back(y, kept, step.work, step.family)


def changed_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    gain: Tensor,
    step: VectorRows,
    norm: int,
    depth: float,
) -> Tensor:
    """``pointwise.rms_norm`` of ``x`` [T, H]; rows whose parts have a difference for the norm: ``n * (gain + sum of
    scale * dg) + sum of scale * dshift`` with n in fp32, rounded once. ``gain`` fp32 [H] is ``offset + weight``.

    Raises a KernelError.
    """
    return _implementation(x.device).changed_rms_norm(
        x, weight, eps, offset, gain, step.work, step.family.norms, norm, depth
    )


def change_norm(
    y: Tensor, normalised: Tensor, gain: Tensor, shift: Tensor | None, step: VectorRows, norm: int, depth: float
) -> None:
    """Any norm: rows of ``y`` [T, H] whose parts have a difference become ``n * (gain + sum of scale * dg) + shift +
    sum of scale * dshift``; ``normalised`` fp32 [T, H] is n. gain, shift fp32 [H]. In place; raises a KernelError."""
    _implementation(y.device).change_norm(y, normalised, gain, shift, step.work, step.family.norms, norm, depth)
