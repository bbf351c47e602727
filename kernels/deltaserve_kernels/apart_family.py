"""Terms that are computed apart, one item of the step after the other: dense differences and residual modules.

They are matrices of an adapter's own that its rows alone multiply, so nothing is gained by one launch for all adapters.
Which rows use them is found on the host, once a step; no operator here looks at the device. Everybody else's rows are
never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.base_weight import ReadWeight, WeightView
from deltaserve_kernels.checks import Member
from deltaserve_kernels.dense_tables import DenseEntry, DenseTables
from deltaserve_kernels.errors import ShapeMismatch
from deltaserve_kernels.module_tables import ModuleEntry, ModuleTables
from deltaserve_kernels.transfer import upload
from deltaserve_kernels.worklist import Parts, Run, WorkList, build_work_list_runs


class ApartEntries(NamedTuple):
    """Of one adapter: ``dense`` by linear, ``modules`` by attach point."""

    dense: tuple[tuple[int, DenseEntry], ...] = ()
    modules: tuple[tuple[int, ModuleEntry], ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for _, entry in self.dense) + sum(entry.nbytes for _, entry in self.modules)

    def to(self, device: torch.device) -> ApartEntries:
        return ApartEntries(
            tuple((linear, entry.to(device)) for linear, entry in self.dense),
            tuple((point, entry.to(device)) for point, entry in self.modules),
        )


class ApartFamily:
    """Two tables over the same slots. For the engine thread, as all tables."""

    def __init__(self, num_linears: int, num_points: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        self.dense = DenseTables(num_linears, num_slots, device)
        self.modules = ModuleTables(num_points, num_slots, device)
        self.num_slots = num_slots
        self._used: set[int] = set()
        self.version = 0  # rises with every change: what was made of the tables before may be of another form

    @property
    def is_empty(self) -> bool:
        return not self._used

    def has_slot(self, slot: int) -> bool:
        return slot in self._used

    def set_all(self, slot: int, entries: ApartEntries) -> None:
        """Point a slot at an adapter's terms. Raises a KernelError; ``clear`` the slot then."""
        self.version += 1
        if entries.dense:
            self.dense.set_all(slot, entries.dense)
            self._used.add(slot)
        if entries.modules:
            self.modules.set_all(slot, entries.modules)
            self._used.add(slot)

    def clear(self, slot: int) -> None:
        """Empty a slot and let go of its tensors."""
        if slot in self._used:
            self.version += 1
            self._used.remove(slot)
            self.dense.clear(slot)
            self.modules.clear(slot)


class ApartItem(NamedTuple):
    """Rows that share a binding: int64 [R] on the step's device; and its parts that are not 0 throughout."""

    rows: Tensor
    parts: Parts


@dataclass(frozen=True)
class ApartStep:
    """The rows of a step whose bindings have terms of the family, by binding."""

    family: ApartFamily
    items: tuple[ApartItem, ...]
    _lists: dict[int, WorkList] = field(default_factory=dict, init=False, repr=False, compare=False)
    _splits: dict[tuple[bool, ...], ApartSplit] = field(default_factory=dict, init=False, repr=False, compare=False)

    def work(self, num_rows: int) -> WorkList:
        """The items as a work list on the host, of a step of ``num_rows`` rows; made at its first use."""
        work = self._lists.get(num_rows)
        if work is None:
            runs = [(row, 1, parts) for rows, parts in self.items for row in rows.tolist()]
            work = self._lists[num_rows] = build_work_list_runs(runs, num_rows)
        return work

    def weight_of(self, members: Sequence[Member], weight: ReadWeight | None) -> WeightView | None:
        """The group's weight where a row's mask reads it, None where none does: nobody pays for a copy in vain.

        Raises ``ShapeMismatch`` where it is needed and not given.
        """
        if not self.family.dense.has_mask(members, (slot for _, parts in self.items for slot, _, _ in parts)):
            return None
        if weight is None:
            raise ShapeMismatch(
                f"linears {[m[0] for m in members]} have a mask, which reads the base's weight; give it"
            )
        return weight()

    def split_at(self, point: int) -> ApartSplit:
        """The items with and without a module at an attach point; the same answer for points of the same items."""
        modules = self.family.modules
        marks = tuple(any(modules.entry(point, slot) for slot, _, _ in parts) for _, parts in self.items)
        split = self._splits.get(marks)
        if split is None:
            split = self._splits[marks] = ApartSplit.of(self, marks)
        return split

    def reads(self, reader: int, point: int) -> bool:
        """Whether a module of the step that is added at the point ``reader`` reads ``point``."""
        modules = self.family.modules
        if point not in modules.reads(reader):
            return False
        entries = (modules.entry(reader, slot) for _, parts in self.items for slot, _, _ in parts)
        return any(entry is not None and entry.reads == point for entry in entries)


class ApartSplit(NamedTuple):
    """Items of a step with a module at some point, their rows (int64), and the other items; None for none."""

    with_module: ApartStep | None
    rows: Tensor | None
    without: ApartStep | None

    @classmethod
    def of(cls, step: ApartStep, marks: tuple[bool, ...]) -> ApartSplit:
        chosen = tuple(item for item, is_chosen in zip(step.items, marks, strict=True) if is_chosen)
        if not chosen:
            return cls(None, None, step)
        rows = torch.cat([item.rows for item in chosen])
        if len(chosen) == len(step.items):
            return cls(step, rows, None)
        others = tuple(item for item, is_chosen in zip(step.items, marks, strict=True) if not is_chosen)
        return cls(ApartStep(step.family, chosen), rows, ApartStep(step.family, others))


def split_apart(runs: Sequence[Run], family: ApartFamily, device: torch.device | str = "cpu") -> ApartStep | None:
    """The rows with such terms among the runs of a step, None when there are none. A part at strength 0 is none."""
    rows: dict[Parts, list[int]] = {}
    for start, count, binding in sorted(runs, key=lambda run: run[0]):
        parts = tuple(part for part in binding if family.has_slot(part[0]) and (part[1] or part[2]))
        if parts and count:
            rows.setdefault(parts, []).extend(range(start, start + count))
    if not rows:
        return None
    host = torch.tensor([row for of_item in rows.values() for row in of_item])
    pieces = upload(host, device).split([len(of_item) for of_item in rows.values()])
    return ApartStep(family, tuple(map(ApartItem, pieces, rows)))
