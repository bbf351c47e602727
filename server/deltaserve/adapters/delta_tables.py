"""The operators' tables of every family of terms: made in one place, given whole to all that read or fill them.

A family joins here: a field of ``DeltaTables`` and its line in ``of``. What fills it is ``DevicePool``, what runs it
``ModelRunner`` and, in captured steps, ``known_families``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch

from deltaserve_kernels import (
    ApartFamily,
    BlockTables,
    LoraTables,
    PrefixTables,
    SparseTables,
    VectorFamily,
    VocabularyFamily,
)

NAMES = ("linears", "norms", "points", "matrices")


class Tunable(Protocol):
    """The part of ``BaseModel`` that tables are made for: names of what adapters may change, and where it lies."""

    @property
    def linears(self) -> Sequence[str]: ...

    @property
    def norms(self) -> Sequence[str]: ...

    @property
    def points(self) -> Sequence[str]: ...

    @property
    def matrices(self) -> Sequence[str | None]: ...

    @property
    def device(self) -> torch.device: ...


class Tables(Protocol):
    """What the tables of all families have in common."""

    @property
    def num_slots(self) -> int: ...

    def has_slot(self, slot: int) -> bool: ...

    def clear(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class DeltaTables:
    """Tables over the same slots, None for a family that is not served; and the names that they go by.

    ``linears[i]`` is the linear that tables call i, ``norms[i]`` the norm, ``points[i]`` the attach point; ``matrices``
    are the embedding and the head, None where adapters cannot change them. Who only runs steps needs no names.
    For the engine thread, as all tables.
    """

    lora: LoraTables | None = None
    sparse: SparseTables | None = None
    vectors: VectorFamily | None = None
    apart: ApartFamily | None = None
    vocabulary: VocabularyFamily | None = None
    blocks: BlockTables | None = None
    prefixes: PrefixTables | None = None
    linears: Sequence[str] = ()
    norms: Sequence[str] = ()
    points: Sequence[str] = ()
    matrices: Sequence[str | None] = (None, None)

    @classmethod
    def of(cls, base: Tunable, num_slots: int, *, has_csr: bool = True) -> DeltaTables:
        """Empty tables of every family on the base's device. ``has_csr``: see ``SparseTables``."""
        num_linears, device = len(base.linears), base.device
        return cls(
            lora=LoraTables(num_linears, num_slots, device),
            sparse=SparseTables(num_linears, num_slots, device, has_csr=has_csr),
            vectors=VectorFamily(num_linears, len(base.norms), num_slots, device),
            apart=ApartFamily(num_linears, len(base.points), num_slots, device),
            vocabulary=VocabularyFamily(num_slots, device),
            blocks=BlockTables(num_linears, num_slots, device),
            prefixes=PrefixTables(num_slots),
            linears=base.linears,
            norms=base.norms,
            points=base.points,
            matrices=base.matrices,
        )

    def served(self) -> Iterator[Tables]:
        """The tables of the families that are served."""
        given = (getattr(self, field.name) for field in fields(self) if field.name not in NAMES)
        return (tables for tables in given if tables is not None)

    def clear(self, slot: int) -> None:
        """Empty a slot of every family and let go of its tensors."""
        for tables in self.served():
            if tables.has_slot(slot):
                tables.clear(slot)
