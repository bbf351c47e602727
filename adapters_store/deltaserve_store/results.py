"""What operations of the store answer."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve_store.manifest import AdapterRecord


@dataclass(frozen=True, slots=True)
class CommitResult:
    """``created`` is False when the name had these bytes among its versions already."""

    record: AdapterRecord
    created: bool


@dataclass(frozen=True, slots=True)
class GcResult:
    """Versions removed and the bytes of adapter files that this freed (derived files come on top)."""

    versions: tuple[str, ...]
    num_bytes: int
