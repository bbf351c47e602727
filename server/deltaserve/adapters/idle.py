"""Adapters on the device that no sequence pins: the ones that may be evicted, least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from deltaserve.adapters.demand import Demand
from deltaserve.adapters.resident import Resident


class IdleAdapters:
    """Ordered by when their last pin went; ``nbytes`` is their sum."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._residents: OrderedDict[str, Resident] = OrderedDict()

    def __contains__(self, version: str) -> bool:
        return version in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def versions(self) -> list[str]:
        return list(self._residents)

    def get(self, version: str) -> Resident:
        return self._residents[version]

    def add(self, resident: Resident) -> None:
        self._residents[resident.version] = resident
        self.nbytes += resident.nbytes

    def discard(self, resident: Resident) -> None:
        if self._residents.pop(resident.version, None) is not None:
            self.nbytes -= resident.nbytes

    def victim(self, keep: Collection[str], demand: Demand) -> Resident:
        """The one to evict: least recently used that no waiting sequence wants, else the one wanted last.

        ``keep`` is spared. Raises ``ValueError`` when nothing is left.
        """
        candidates = [resident for version, resident in self._residents.items() if version not in keep]
        for resident in candidates:
            if resident.version not in demand:
                return resident
        return max(candidates, key=lambda resident: demand.lateness(resident.version))

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` when the bytes do not add up."""
        total = sum(resident.nbytes for resident in self._residents.values())
        if total != self.nbytes:
            raise RuntimeError(f"idle adapters hold {total} bytes, {self.nbytes} are booked")
