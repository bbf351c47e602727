"""How much an upload may bring. All sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass

MB = 1 << 20


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """``max_total_bytes`` bounds the unpacked files together, and an archive as received. ``max_ratio`` is the highest
    compression an archive may show once more than ``ratio_floor_bytes`` have come out of it.
    """

    max_total_bytes: int = 2560 * MB
    max_entries: int = 64
    max_ratio: int = 200
    ratio_floor_bytes: int = 1 * MB
