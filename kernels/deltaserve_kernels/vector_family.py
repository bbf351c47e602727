"""All vector terms of one server, and the rows of a step that have some.

A row's terms are found once a step, by its binding. Rows with vectors take a path of their own through every projection
(base product, scales and biases, low rank, sparse, each rounded), so that nobody's bits depend on who has vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.transfer import upload
from deltaserve_kernels.vector_tables import VectorEntry, VectorTables
from deltaserve_kernels.worklist import Run, WorkList, build_work_list_runs

Entries = tuple[tuple[int, VectorEntry], ...]


class VectorEntries(NamedTuple):
    """The vectors of one adapter, fp32. ``outputs`` and ``inputs`` by linear, ``norms`` by norm.

    Of ``outputs`` a scale and a bias [out], of ``inputs`` a scale [in]; of ``norms`` differences of gain and shift.
    """

    outputs: Entries = ()
    inputs: Entries = ()
    norms: Entries = ()

    def tensors(self) -> list[Tensor]:
        return [t for entries in self for _, entry in entries for t in entry if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device) -> VectorEntries:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return VectorEntries(
            *(
                tuple((index, VectorEntry(move(entry.scale), move(entry.bias))) for index, entry in entries)
                for entries in self
            )
        )


class VectorFamily:
    """Three tables over the same slots: scales and biases of outputs, scales of inputs, differences of norms.

    For the engine thread, as all tables.
    """

    def __init__(self, num_linears: int, num_norms: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        self.outputs = VectorTables(num_linears, num_slots, device)
        self.inputs = VectorTables(num_linears, num_slots, device)
        self.norms = VectorTables(num_norms, num_slots, device)
        self.num_slots = num_slots
        self._used: set[int] = set()

    @property
    def is_empty(self) -> bool:
        return not self._used

    def has_slot(self, slot: int) -> bool:
        """True when the slot has a vector of any kind."""
        return slot in self._used

    def set_all(self, slot: int, entries: VectorEntries) -> None:
        """Point a slot at an adapter's vectors. Raises a KernelError; ``clear`` the slot then."""
        for tables, given in zip((self.outputs, self.inputs, self.norms), entries, strict=True):
            if given:
                tables.set_all(slot, given)
                self._used.add(slot)

    def clear(self, slot: int) -> None:
        """Empty a slot and let go of its tensors."""
        if slot in self._used:
            self._used.remove(slot)
            for tables in (self.outputs, self.inputs, self.norms):
                tables.clear(slot)


@dataclass(frozen=True)
class VectorStep:
    """The rows of a step whose bindings have vectors, apart from the other rows with adapters.

    work:    these rows among the step's rows
    others:  the other rows with adapters, or None
    rows:    int64 [R], these rows in the order of ``work``;  compact: the same items over R rows numbered in that order
    counts:  per item, its rows
    slots:   per item, the slots of its parts whose scale is not 0 throughout: those change nothing, to the bit
    """

    family: VectorFamily
    work: WorkList
    others: WorkList | None
    rows: Tensor
    compact: WorkList
    slots: tuple[tuple[int, ...], ...]
    counts: tuple[int, ...]
    _chosen: dict[tuple[bool, ...], Tensor] = field(default_factory=dict, repr=False)

    def rows_with(self, tables: VectorTables, index: int) -> Tensor | None:
        """Which of 0..R have an entry for this linear or norm, int64; None: all. Told by their own bindings alone."""
        has = tuple(any(tables.get(index, slot) is not None for slot in slots) for slots in self.slots)
        if all(has):
            return None
        known = self._chosen.get(has)
        if known is None:
            flags = torch.repeat_interleave(torch.tensor(has), torch.tensor(self.counts))
            known = self._chosen[has] = upload(flags.nonzero()[:, 0], self.rows.device)
        return known


def split_runs(
    runs: Sequence[Run], num_rows: int, family: VectorFamily, device: torch.device | str = "cpu"
) -> VectorStep | None:
    """The rows with vectors among the runs of a step, None when there are none. Raises as ``build_work_list_runs``."""
    chosen = [run for run in runs if run[1] and _active(run, family)]
    if not chosen:
        return None
    others = [run for run in runs if run[2] and not _active(run, family)]
    work = build_work_list_runs(chosen, num_rows, device)
    bindings = list(dict.fromkeys(run[2] for run in sorted(chosen, key=lambda run: run[0])))
    sizes = [sum(run[1] for run in chosen if run[2] == binding) for binding in bindings]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    compact = build_work_list_runs(list(zip(starts, sizes, bindings, strict=True)), sum(sizes), device)
    return VectorStep(
        family=family,
        work=work,
        others=build_work_list_runs(others, num_rows, device) if others else None,
        rows=work.rows.long(),
        compact=compact,
        slots=tuple(tuple(part[0] for part in binding if any(part[1:])) for binding in bindings),
        counts=tuple(sizes),
    )


def _active(run: Run, family: VectorFamily) -> bool:
    return any(family.has_slot(slot) and (first or last) for slot, first, last in run[2])
