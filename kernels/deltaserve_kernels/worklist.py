"""Work list: the rows of one step, grouped by binding. Built once per step, read by every operator of every layer.

A *part* is (slot, scale at the first decoder layer, scale at the last one); a *binding* is an ordered tuple of parts.
Rows that share a binding form one *item*. Rows with the empty binding (base only) appear nowhere, so they cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deltaserve_kernels.errors import DtypeMismatch, OutOfRange, ShapeMismatch
from deltaserve_kernels.transfer import upload

if TYPE_CHECKING:
    from deltaserve_kernels.pointer_tables import PointerTables

Part = tuple[int, float, float]
Parts = tuple[Part, ...]
Run = tuple[int, int, Parts]


@dataclass(frozen=True)
class WorkList:
    """Rows of one step grouped by binding; all tensors live on one device.

    num_rows:   T, rows of the step (``x`` and ``y`` must have as many)
    rows:       int32 [R]    token rows, grouped by item, strictly ascending inside an item; no row twice
    item_rows:  int32 [I+1]  item i covers ``rows[item_rows[i]:item_rows[i+1]]``, never empty
    item_parts: int32 [I+1]  item i uses parts ``item_parts[i]:item_parts[i+1]``, in binding order, never none
    part_slot:  int32 [P]
    part_scale: float32 [P, 2]  (scale at the first layer, at the last layer)
    num_planes: sum over items of rows * parts, or a bound; None: only the device knows
    is_padded:  the arrays have a fixed capacity (``padded_list``): items past the last are empty, and rows and parts
                past the last are never read. What is in them is known to the device alone. Not for the
                C++ operators.
    has_prompts: some sequence has several rows in the step: operators may take their form for many rows an adapter
    prepared:   what the C++ operators made of the list at its first use; changes to the tensors later do not reach it
    """

    num_rows: int
    rows: Tensor
    item_rows: Tensor
    item_parts: Tensor
    part_slot: Tensor
    part_scale: Tensor
    num_planes: int | None = None
    is_padded: bool = False
    has_prompts: bool = False
    prepared: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def remember(self, prepared: Tensor) -> None:
        """Keep a derived form with the list. ``dataclasses.replace`` leaves it behind."""
        object.__setattr__(self, "prepared", prepared)

    @property
    def is_empty(self) -> bool:
        """True when no row of the step has an adapter; a padded list never tells."""
        return self.rows.numel() == 0

    def concerns(self, tables: PointerTables, members: Sequence[tuple[int, int, int]]) -> bool:
        """Whether an operator has to run: False where no slot has an entry for any member (linear, start, stop).

        A padded list always concerns: a captured launch stays when adapters come and go.
        """
        return self.is_padded or tables.has_any_of(members)

    @property
    def num_items(self) -> int:
        return self.item_rows.numel() - 1

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def validate(self) -> None:
        """Check a list that did not come from this module's builders. Copies to the host; not for every step.

        Raises DtypeMismatch, ShapeMismatch or OutOfRange.
        """
        for name in ("rows", "item_rows", "item_parts", "part_slot"):
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
                raise DtypeMismatch(f"{name} is {tensor.dtype} {list(tensor.shape)}; a contiguous int32 vector is due")
        if self.part_scale.dtype != torch.float32 or self.part_scale.shape != (self.part_slot.numel(), 2):
            raise ShapeMismatch(
                f"part_scale is {self.part_scale.dtype} {list(self.part_scale.shape)}; "
                f"float32 [{self.part_slot.numel()}, 2] is needed"
            )
        if not self.part_scale.is_contiguous():
            raise ShapeMismatch("part_scale is not contiguous")
        rows, item_rows, item_parts = (t.cpu().numpy() for t in (self.rows, self.item_rows, self.item_parts))
        for name, starts, total in (
            ("item_rows", item_rows, rows.size),
            ("item_parts", item_parts, self.part_slot.numel()),
        ):
            if starts.size == 0 or starts[0] != 0 or not self._rises(np.diff(starts), int(starts[-1]), total):
                raise OutOfRange(f"{name} must rise strictly from 0 to {total}")
        if item_rows.size != item_parts.size:
            raise ShapeMismatch(f"item_rows has {item_rows.size} entries and item_parts {item_parts.size}")
        rows = rows[: item_rows[-1]]
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_rows or np.unique(rows).size != rows.size):
            raise OutOfRange(f"rows must be distinct and in 0..{self.num_rows - 1}")

    def _rises(self, steps: np.ndarray, last: int, total: int) -> bool:
        """Whether starts rise as they must; those of a padded list stay where they are after the last item."""
        if not self.is_padded:
            return last == total and not (steps <= 0).any()
        used = int(np.count_nonzero(steps))
        return last <= total and not (steps[:used] <= 0).any()


def build_work_list(row_bindings: Sequence[Parts], device: torch.device | str = "cpu") -> WorkList:
    """Group rows by binding: one entry a row, ``((slot, scale_first, scale_last), ...)``, ``()`` for the base alone.

    Items come in the order of their first row. Raises OutOfRange for a negative slot.
    """
    groups: dict[Parts, list[int]] = {}
    for row, parts in enumerate(row_bindings):
        if parts:
            group = groups.get(parts)
            if group is None:
                groups[parts] = [row]
            else:
                group.append(row)
    return _pack(groups, len(row_bindings), device)


def build_work_list_runs(runs: Sequence[Run], num_rows: int, device: torch.device | str = "cpu") -> WorkList:
    """The same from runs ``(start_row, num_rows, parts)``, e.g. one per scheduled sequence.

    Runs may come in any order and need not cover every row; rows outside all runs are base only. Raises OutOfRange
    for runs that overlap or leave ``0..num_rows``, and for a negative slot.
    """
    groups: dict[Parts, list[int]] = {}
    end = 0
    has_prompts = False
    for start, count, parts in sorted(runs, key=_run_start):
        if count < 0 or start < end or start + count > num_rows:
            raise OutOfRange(
                f"run of {count} rows at row {start} overlaps the previous run (which ends at row {end}) "
                f"or leaves the step's {num_rows} rows"
            )
        end = start + count
        if parts and count:
            has_prompts = has_prompts or count > 1
            group = groups.get(parts)
            if group is None:
                groups[parts] = [start] if count == 1 else list(range(start, end))
            elif count == 1:
                group.append(start)
            else:
                group.extend(range(start, end))
    return _pack(groups, num_rows, device, has_prompts)


def _run_start(run: Run) -> int:
    return run[0]


def _pack(
    groups: dict[Parts, list[int]], num_rows: int, device: torch.device | str, has_prompts: bool = False
) -> WorkList:
    parts = [part for binding in groups for part in binding]
    slots = [part[0] for part in parts]
    if slots and min(slots) < 0:
        raise OutOfRange(f"slot {min(slots)} is negative; an empty binding () means the base alone")
    rows = [row for group in groups.values() for row in group]
    item_rows = list(accumulate(map(len, groups.values()), initial=0))
    item_parts = list(accumulate(map(len, groups), initial=0))
    num_planes = sum(len(group) * len(binding) for binding, group in groups.items())
    # One buffer and one copy: on a GPU five small host-to-device copies would cost more than the building.
    sizes = (len(rows), len(item_rows), len(item_parts), len(slots))
    scales = np.array([part[1:] for part in parts], dtype=np.float32).reshape(-1)
    numbers = np.array(rows + item_rows + item_parts + slots, dtype=np.int32)
    packed = upload(torch.from_numpy(np.concatenate([numbers, scales.view(np.int32)])), device)
    split = packed.split((*sizes, 2 * len(slots)))
    scale = split[4].view(torch.float32).view(len(slots), 2)
    return WorkList(num_rows, split[0], split[1], split[2], split[3], scale, num_planes, has_prompts=has_prompts)
