"""What a waiting sequence takes before it starts, with all rows of its ensemble: pins of adapters, and prefixes."""

from __future__ import annotations

from collections.abc import Iterator

from deltaserve.adapters.binding import check_binding
from deltaserve.adapters.residency import AdapterResidency
from deltaserve.engine.block_manager import BLOCK_SIZE
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.member_errors import blame_member, told_of_member
from deltaserve.engine.prefix_seat import seat_prefixes
from deltaserve.engine.sequence import Sequence
from deltaserve.errors import AdapterUnavailable
from deltaserve_kernels import PrefixTables

Slots = tuple[int, ...]


def acquire(seq: Sequence, residency: AdapterResidency) -> Slots | None:
    """Pin the adapters of all rows: the slots of ``seq.needed_versions``. None, and nothing pinned, when that cannot be
    now.

    Raises ``AdapterUnavailable`` or ``CompositionRefused``; nothing is evicted for what is refused.
    """
    if seq.lockstep is None:
        if not seq.is_probe:
            check_binding(seq.binding, residency)
        return residency.acquire(seq.versions)
    for index, row in enumerate(seq.rows):
        with told_of_member(index):
            check_binding(row.binding, residency)
    versions = seq.needed_versions
    try:
        return residency.acquire(versions)
    except AdapterUnavailable as error:
        failed = frozenset(version for version in versions if residency.failure(version) is not None)
        blame_member(error, seq.lockstep.ensemble, failed)
        raise


def by_row(seq: Sequence, slots: Slots) -> Iterator[tuple[Sequence, Slots]]:
    """Each row with the slots of its own versions; ``slots`` are those that ``acquire`` gave."""
    begin = 0
    for row in seq.rows:
        end = begin + len(row.versions)
        yield row, slots[begin:end]
        begin = end


def seat_rows(seq: Sequence, slots: Slots, tables: PrefixTables, limits: EngineLimits, num_blocks: int) -> None:
    """``seat_prefixes`` for every row. Raises as that does, and ``EnsembleRefused`` when the rows of an ensemble are
    too long for ``num_blocks`` with their prefixes."""
    if seq.lockstep is None:
        seat_prefixes(seq, slots, tables, limits)
        return
    for index, (row, own) in enumerate(by_row(seq, slots)):
        with told_of_member(index):
            seat_prefixes(row, own, tables, limits)
    longest = seq.num_prompt_tokens + seq.sampling.max_tokens
    limits.check_rows([row.num_prefix_tokens + longest for row in seq.rows], num_blocks, BLOCK_SIZE)
