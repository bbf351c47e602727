"""All vector terms and rotations of one server, and the rows of a step that have some.

A row's terms are found once a step, by its binding. Where a product cannot take vectors into its sums, rows with them
take a path of their own through every projection (base product, scales and biases, low rank, sparse, each rounded), so
that nobody's bits depend on who has vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.pointer_tables import PointerTables
from deltaserve_kernels.rotation_tables import RotationEntry, RotationFactor, RotationTables
from deltaserve_kernels.transfer import upload
from deltaserve_kernels.vector_tables import VectorEntry, VectorTables
from deltaserve_kernels.worklist import Parts, Run, WorkList, build_work_list_runs

Entries = tuple[tuple[int, VectorEntry], ...]
Rotations = tuple[tuple[int, RotationEntry], ...]


class VectorEntries(NamedTuple):
    """The vectors of one adapter, as tables take them, and its rotations.

    ``outputs`` and ``inputs`` by linear, ``norms`` by norm. Of ``outputs`` a scale and a bias [out], of ``inputs`` a
    scale [in]; of ``norms`` differences of gain and shift, fp32;
    ``in_rotations`` and ``out_rotations`` by linear, in the serving dtype.
    """

    outputs: Entries = ()
    inputs: Entries = ()
    norms: Entries = ()
    in_rotations: Rotations = ()
    out_rotations: Rotations = ()

    def tensors(self) -> list[Tensor]:
        vectors = [t for entries in self[:3] for _, entry in entries for t in entry if t is not None]
        rotations = self.in_rotations + self.out_rotations
        return vectors + [t for _, factors in rotations for factor in factors for t in factor.tensors()]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device) -> VectorEntries:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        def turn(rotations: Rotations) -> Rotations:
            return tuple(
                (index, tuple(RotationFactor(blocks.to(device), move(order)) for blocks, order in factors))
                for index, factors in rotations
            )

        outputs, inputs, norms = (
            tuple((index, VectorEntry(move(entry.scale), move(entry.bias))) for index, entry in entries)
            for entries in (self.outputs, self.inputs, self.norms)
        )
        return VectorEntries(outputs, inputs, norms, turn(self.in_rotations), turn(self.out_rotations))


class VectorFamily:
    """Tables over the same slots: scales and biases of outputs, scales of inputs, differences of norms; rotations of
    inputs and of outputs.

    For the engine thread, as all tables.
    """

    def __init__(self, num_linears: int, num_norms: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        self.outputs = VectorTables(num_linears, num_slots, device, takes_narrow=True)
        self.inputs = VectorTables(num_linears, num_slots, device, takes_narrow=True)
        self.norms = VectorTables(num_norms, num_slots, device)
        self.in_rotations = RotationTables(num_linears, num_slots, device)
        self.out_rotations = RotationTables(num_linears, num_slots, device)
        self.num_slots = num_slots
        self.version = 0
        """Rises with every change: what was found out about the tables holds while it stays."""
        self._used: set[int] = set()
        # int32 [num_slots], 1 where a slot has anything: what kernels know rows with vectors by.
        self.flags = torch.zeros(num_slots, dtype=torch.int32, device=device)

    @property
    def is_empty(self) -> bool:
        return not self._used

    def has_slot(self, slot: int) -> bool:
        """True when the slot has a vector of any kind."""
        return slot in self._used

    def num_factors(self, slot: int) -> int:
        """The most factors that a rotation of the slot has; 0: it turns nothing."""
        return max(self.in_rotations.num_factors(slot), self.out_rotations.num_factors(slot))

    def set_all(self, slot: int, entries: VectorEntries) -> None:
        """Point a slot at an adapter's vectors. Raises a KernelError; ``clear`` the slot then."""
        self.version += 1
        for tables, given in zip((self.outputs, self.inputs, self.norms), entries[:3], strict=True):
            if given:
                self._used.add(slot)
                tables.set_all(slot, given)
        for turns, factors in ((self.in_rotations, entries.in_rotations), (self.out_rotations, entries.out_rotations)):
            if factors:
                self._used.add(slot)
                turns.set_all(slot, factors)
        if slot in self._used:
            self.flags[slot] = 1

    def clear(self, slot: int) -> None:
        """Empty a slot and let go of its tensors."""
        if slot in self._used:
            self.version += 1
            self._used.remove(slot)
            self.flags[slot] = 0
            for tables in (self.outputs, self.inputs, self.norms, self.in_rotations, self.out_rotations):
                if tables.has_slot(slot):
                    tables.clear(slot)


class Prepared(NamedTuple):
    """Vectors of a step's rows in the form of C++ operators, None where the tables hold nothing.

    ``outputs`` are those of rows whose outputs nothing rotates.
    """

    version: int
    outputs: Tensor | None
    inputs: Tensor | None
    norms: Tensor | None


@dataclass(frozen=True)
class VectorStep:
    """The rows of a step whose bindings have vectors, apart from the other rows with adapters.

    work:    these rows among the step's rows
    slots:   per item, the slots of its parts whose scale is not 0 throughout: those change nothing, to the bit
    counts:  per item, its rows
    turned:  those of the rows whose bindings rotate some output, None when there are none
    others:  the other rows with adapters, or None
    prepared: what C++ operators found of these rows in the tables, and the tables' version then
    rows:    int64 [R], these rows in the order of ``work``;  compact: the same items over R rows numbered in that order
    """

    family: VectorFamily
    work: WorkList
    slots: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    turned: Turned | None = None
    _own_runs: tuple[Run, ...] = field(default=(), repr=False)
    _other_runs: tuple[Run, ...] = field(default=(), repr=False)
    _chosen: dict[tuple[bool, ...], Tensor] = field(default_factory=dict, repr=False)
    prepared: Prepared | None = field(default=None, init=False, repr=False, compare=False)

    def remember(self, prepared: Prepared) -> None:
        """Keep a derived form with the step, as ``WorkList.remember``."""
        object.__setattr__(self, "prepared", prepared)

    # What only some paths ask for is made when they do: a batch may change with every step.

    @cached_property
    def others(self) -> WorkList | None:
        work = self.work
        return build_work_list_runs(self._other_runs, work.num_rows, work.device) if self._other_runs else None

    @cached_property
    def rows(self) -> Tensor:
        return self.work.rows.long()

    @cached_property
    def compact(self) -> WorkList:
        found = build_work_list_runs(self._own_runs, sum(self.counts), self.work.device)
        # What the step is, not how many rows share a binding: forms of operators go by it.
        return replace(found, has_prompts=self.work.has_prompts)

    def rows_with(self, tables: PointerTables, index: int, *others: PointerTables) -> Tensor | None:
        """Which of 0..R have an entry for this linear or norm in some of the tables, int64; None: all. Told by their
        own bindings alone."""
        known_by = (tables, *others)
        has = tuple(
            any(table.mark(index, slot) is not None for slot in slots for table in known_by) for slots in self.slots
        )
        if all(has):
            return None
        known = self._chosen.get(has)
        if known is None:
            flags = torch.repeat_interleave(torch.tensor(has), torch.tensor(self.counts))
            known = self._chosen[has] = upload(flags.nonzero()[:, 0], self.rows.device)
        return known


class Turned(NamedTuple):
    """Rows of a step with rotated outputs, a step of their own; and all other rows with adapters."""

    step: VectorStep
    others: WorkList


def split_runs(
    runs: Sequence[Run], num_rows: int, family: VectorFamily, device: torch.device | str = "cpu"
) -> VectorStep | None:
    """The rows with vectors among the runs of a step, None when there are none. Raises as ``build_work_list_runs``."""
    chosen = [run for run in runs if run[1] and _active(run, family)]
    if not chosen:
        return None
    step = _step_of(chosen, runs, num_rows, family, device)
    if family.out_rotations.is_empty:
        return step
    turned = [run for run in chosen if _active(run, family.out_rotations)]
    if not turned:
        return step
    own = _step_of(turned, runs, num_rows, family, device)
    others = [run for run in runs if not _active(run, family.out_rotations)]
    return replace(step, turned=Turned(own, build_work_list_runs(others, num_rows, device)))


def _step_of(
    chosen: Sequence[Run], runs: Sequence[Run], num_rows: int, family: VectorFamily, device: torch.device | str
) -> VectorStep:
    taken = set(chosen)
    others = [run for run in runs if run[2] and run not in taken]
    work = build_work_list_runs(chosen, num_rows, device)
    bindings = list(dict.fromkeys(run[2] for run in sorted(chosen, key=lambda run: run[0])))
    counts: dict[Parts, int] = dict.fromkeys(bindings, 0)
    for run in chosen:
        counts[run[2]] += run[1]
    sizes = list(counts.values())
    starts = accumulate(sizes[:-1], initial=0)
    return VectorStep(
        family=family,
        work=work,
        slots=tuple(tuple(part[0] for part in binding if any(part[1:])) for binding in bindings),
        counts=tuple(sizes),
        _own_runs=tuple(zip(starts, sizes, bindings, strict=True)),
        _other_runs=tuple(others),
    )


def _active(run: Run, tables: VectorFamily | RotationTables) -> bool:
    return any(tables.has_slot(slot) and (first or last) for slot, first, last in run[2])
