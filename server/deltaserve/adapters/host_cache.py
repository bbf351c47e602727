"""Adapters kept in host memory, bounded by bytes, least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

from deltaserve.adapters.device_pool import StagedAdapter
from deltaserve.deltas.composition import NO_TRAITS, Traits

GOES_FIRST = -(1 << 30)
"""The lowest rank for ``HostCache.find_room``."""


@dataclass(frozen=True, slots=True)
class HostedAdapter:
    """An adapter's terms in the forms that the device's operators read, and their size, measured once: what they take
    on the host and again on a device with memory of its own. Where memory is shared they are ready to use. By its
    ``traits`` compositions are judged."""

    terms: StagedAdapter
    nbytes: int
    traits: Traits = NO_TRAITS


class HostCache:
    """``used_bytes`` never exceeds ``max_bytes``. Which entry may go is the caller's decision (``residency.py``)."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._hosted: OrderedDict[str, HostedAdapter] = OrderedDict()

    def __contains__(self, version: str) -> bool:
        return version in self._hosted

    def __len__(self) -> int:
        return len(self._hosted)

    def versions(self) -> list[str]:
        """What is kept, least recently used first."""
        return list(self._hosted)

    @property
    def free_bytes(self) -> int:
        return self.max_bytes - self.used_bytes

    def get(self, version: str) -> HostedAdapter:
        """The adapter, which becomes the most recently used. Raises ``KeyError``."""
        self._hosted.move_to_end(version)
        return self._hosted[version]

    def put(self, version: str, adapter: HostedAdapter) -> None:
        """Keep an adapter. Raises ``ValueError`` when it is already kept or does not fit: make room first."""
        if version in self._hosted:
            raise ValueError("the version is already in the host cache")
        if adapter.nbytes > self.free_bytes:
            raise ValueError(f"{adapter.nbytes} bytes do not fit into {self.free_bytes} free bytes")
        self._hosted[version] = adapter
        self.used_bytes += adapter.nbytes

    def pop(self, version: str) -> HostedAdapter:
        """Let go of an adapter. Raises ``KeyError``."""
        adapter = self._hosted.pop(version)
        self.used_bytes -= adapter.nbytes
        return adapter

    def find_room(self, nbytes: int, order: Callable[[str], int | None]) -> list[str] | None:
        """Versions to evict so that ``nbytes`` fit, or None when the evictable ones are not enough.

        ``order(version)`` is None for a version that must stay, else small for one that should go first, at least
        ``GOES_FIRST``; among equals the least recently used goes first. Of thousands kept, few are looked at as long
        as those that go first are enough: this runs on the step loop.
        """
        missing = nbytes - self.free_bytes
        if missing <= 0:
            return []
        victims: list[str] = []
        later: list[tuple[int, str]] = []
        for version in self._hosted:
            rank = order(version)
            if rank == GOES_FIRST:
                victims.append(version)
                missing -= self._hosted[version].nbytes
                if missing <= 0:
                    return victims
            elif rank is not None:
                later.append((rank, version))
        for _, version in sorted(later, key=itemgetter(0)):
            victims.append(version)
            missing -= self._hosted[version].nbytes
            if missing <= 0:
                return victims
        return None

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` when the bytes do not add up."""
        total = sum(adapter.nbytes for adapter in self._hosted.values())
        if total != self.used_bytes or not 0 <= total <= self.max_bytes:
            raise RuntimeError(f"host cache: {total} bytes held, {self.used_bytes} booked, {self.max_bytes} allowed")
