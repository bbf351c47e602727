"""What the adapters of a step's rows ask of it, kept while the same bindings stay in the same rows, as they do from one
decode step to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.model.context import GroupsFound
from deltaserve_kernels import (
    ApartFamily,
    ApartRows,
    ApartStep,
    BlockTables,
    VectorFamily,
    VectorRows,
    VectorStep,
    WorkList,
    build_work_list_runs,
    split_apart_rows,
    split_vectors,
)

# (first row, number of rows, active parts as (slot, scale_first, scale_last))
Run = tuple[int, int, tuple[tuple[int, float, float], ...]]
# Slots with terms of a family, and the version of its tables: a slot may hold another adapter than it did in an equal
# step before, of which a step is made in another form.
Held = tuple[frozenset[int], int] | None
Family = TypeVar("Family", VectorFamily, ApartFamily)
Step = TypeVar("Step")


@dataclass(slots=True)
class RowLists:
    """Of one step: its ``runs`` and work list, and the rows with further terms; of a step without adapters nothing."""

    runs: list[Run] = field(default_factory=list)
    work: WorkList | None = None
    vectors: VectorStep | VectorRows | None = None
    apart: ApartStep | ApartRows | None = None
    blocks: BlockTables | None = None
    found: GroupsFound = field(default_factory=dict)


class RowListMaker:
    """For one runner: remembers its last step."""

    def __init__(self, tables: DeltaTables, device: torch.device) -> None:
        self.tables = tables
        self.device = device
        families = (tables.lora, tables.sparse, tables.vectors, tables.apart, tables.blocks)
        self._versioned = [family for family in families if family is not None]
        self._versions: list[int] = []
        self._bindings: list[tuple[ScheduledPart, ...]] | None = None  # of a decode step in which all parts had joined
        self._last_join = 0
        self._num_rows = -1
        self.last = RowLists()
        """Of the last step in which some row had an adapter."""
        self._vector_slots: Held = None
        self._apart_slots: Held = None

    def of(self, batch: Sequence[ScheduledSequence], starts: Any, bounds: Any) -> RowLists:
        """``starts`` int64 [S], first positions of the sequences; ``bounds`` int64 [S + 1], their ranges of rows."""
        num_rows, versions = int(bounds[-1]), [tables.version for tables in self._versioned]
        is_decode, are_same = num_rows == len(batch), versions == self._versions
        bindings = [seq.parts for seq in batch] if is_decode else None
        if are_same and is_decode and bindings == self._bindings and starts.min() >= self._last_join:
            return self.last
        runs = _runs(batch, bounds)
        if not runs:
            self._bindings = None
            return RowLists()
        if not (are_same and runs == self.last.runs and num_rows == self._num_rows):
            self.last = self._make(runs, num_rows)
            self._num_rows, self._versions = num_rows, versions
        if bindings is not None:
            self._last_join = max((part[3] for parts in bindings for part in parts), default=0)
            if starts.min() < self._last_join:
                bindings = None
        self._bindings = bindings
        return self.last

    def _make(self, runs: list[Run], num_rows: int) -> RowLists:
        """From what is left of the last step where that is the same, though tables changed."""
        last, tables = self.last, self.tables
        is_same = runs == last.runs and num_rows == self._num_rows
        kept = last.work if is_same else None
        lists = RowLists(runs, build_work_list_runs(runs, num_rows, self.device) if kept is None else kept)
        vectors, apart = (last.vectors, self._vector_slots), (last.apart, self._apart_slots)
        lists.vectors, self._vector_slots = _step_of(
            tables.vectors,
            runs,
            vectors if is_same else (None, None),
            lambda family: split_vectors(runs, num_rows, family, self.device),
        )
        lists.apart, self._apart_slots = _step_of(
            tables.apart,
            runs,
            apart if is_same else (None, None),
            lambda family: split_apart_rows(runs, num_rows, family, self.device),
        )
        lists.blocks = _blocks_of(tables.blocks, runs)
        return lists


def _runs(batch: Sequence[ScheduledSequence], bounds: Any) -> list[Run]:
    """Rows by binding. A part joins at its start position, so a sequence may fall into several runs."""
    runs: list[Run] = []
    for i, seq in enumerate(batch):
        if not seq.parts:
            continue
        row = int(bounds[i]) - seq.start
        joins = [part[3] for part in seq.parts if part[3] > seq.start]
        edges = sorted({seq.start, seq.stop, *(j for j in joins if j < seq.stop)}) if joins else (seq.start, seq.stop)
        for begin, end in pairwise(edges):
            active = tuple((slot, first, last) for slot, first, last, since in seq.parts if since <= begin)
            if active:
                runs.append((row + begin, end - begin, active))
    return runs


def _step_of(
    family: Family | None, runs: Iterable[Run], last: tuple[Step | None, Held], make: Callable[[Family], Step | None]
) -> tuple[Step | None, Held]:
    """The rows with terms of a family, as in the ``last`` equal step if that still holds; and what it was made of."""
    if family is None or family.is_empty:
        return None, None
    slots = frozenset(slot for _, _, parts in runs for slot, _, _ in parts if family.has_slot(slot))
    if not slots:
        return None, None
    step, held = last
    now = (slots, family.version)
    return (make(family) if step is None or held != now else step), now


def _blocks_of(blocks: BlockTables | None, runs: Iterable[Run]) -> BlockTables | None:
    """The tables of blocks, where a row of the step has one."""
    if blocks is None or blocks.is_empty:
        return None
    return blocks if any(blocks.has_slot(slot) for _, _, parts in runs for slot, _, _ in parts) else None
