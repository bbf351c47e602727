"""How many bytes of adapter files a store may hold."""

from __future__ import annotations

from collections.abc import Mapping

from deltaserve_store.errors import StoreFull


class Quota:
    """Books the size of each version; ``limit_bytes`` None does not bound. The caller serialises changes."""

    def __init__(self, limit_bytes: int | None, sizes: Mapping[str, int]) -> None:
        self._limit_bytes = limit_bytes
        self._sizes = dict(sizes)

    def used_bytes(self) -> int:
        return sum(self._sizes.values())

    def room_bytes(self) -> int | None:
        return None if self._limit_bytes is None else max(0, self._limit_bytes - self.used_bytes())

    def check(self, num_bytes: int) -> None:
        """Raises ``StoreFull`` when a new version of that size does not fit."""
        room = self.room_bytes()
        if room is not None and num_bytes > room:
            raise StoreFull(
                f"the adapter has {num_bytes} bytes, the quota of {self._limit_bytes} bytes leaves {room}; "
                "delete adapters and run gc, or raise --store-quota"
            )

    def add(self, version: str, num_bytes: int) -> None:
        self._sizes[version] = num_bytes

    def remove(self, version: str) -> int:
        """Bytes that the version had."""
        return self._sizes.pop(version, 0)
