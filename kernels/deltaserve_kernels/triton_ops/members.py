"""The members that share a launch, as kernels take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deltaserve_kernels.checks import Member

MAX_MEMBERS = 3


class MemberGroup(NamedTuple):
    """Up to three members of one launch. The last three fields are filled up to three with members of no width, since a
    kernel has as many arguments whatever it is given."""

    members: Sequence[Member]
    linears: tuple[int, ...]
    widths: tuple[int, ...]
    columns: tuple[int, ...]

    def num_tiles(self, width: int) -> int:
        """Output tiles of ``width`` columns; a tile belongs to one member."""
        return sum(-(-columns // width) for columns in self.widths)

    @property
    def place(self) -> dict[str, int]:
        return place_of(self.widths, self.columns)


def groups_of(members: Sequence[Member]) -> Iterator[MemberGroup]:
    """The members in launches of at most three, in order."""
    for begin in range(0, len(members), MAX_MEMBERS):
        group = members[begin : begin + MAX_MEMBERS]
        padded = [*group, *[(0, 0, 0)] * (MAX_MEMBERS - len(group))]
        linears, starts, stops = zip(*padded, strict=True)
        widths = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        yield MemberGroup(group, linears, widths, starts)


def place_of(widths: Sequence[int], columns: Sequence[int]) -> dict[str, int]:
    """Where members lie in y, as a kernel's constants: a model has few such layouts, and knows them."""
    return {f"WIDTH{i}": width for i, width in enumerate(widths)} | {f"COLUMN{i}": at for i, at in enumerate(columns)}
