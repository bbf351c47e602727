"""The two tiers of memory and who is in them: what fits, what must go first, and taking a version out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from deltaserve.adapters.demand import Demand
from deltaserve.adapters.device_pool import DevicePool
from deltaserve.adapters.host_cache import HostCache
from deltaserve.adapters.idle import IdleAdapters
from deltaserve.adapters.resident import Resident
from deltaserve.errors import AdapterUnavailable

Level = Literal["host", "device"]


class Tiers:
    """Host cache, device pool, and the device's idle adapters. Knows no states: those are residency's."""

    def __init__(self, pool: DevicePool, cache: HostCache) -> None:
        self.pool = pool
        self.cache = cache
        self.idle = IdleAdapters()

    def shortfall(self, needed: Mapping[str, Resident]) -> tuple[int, int]:
        """Slots and bytes that ``needed`` lack once every other idle version is evicted; <= 0: none."""
        missing = [resident for resident in needed.values() if resident.slot < 0]
        if not missing:
            return 0, 0
        spared = [resident for version, resident in needed.items() if version in self.idle]
        slots = len(missing) - self.pool.num_free_slots - (len(self.idle) - len(spared))
        idle_bytes = self.idle.nbytes - sum(resident.nbytes for resident in spared)
        return slots, sum(resident.nbytes for resident in missing) - self.pool.free_bytes - idle_bytes

    def to_drain(
        self, needed: Mapping[str, Resident], residents: Mapping[str, Resident], remaining: Mapping[str, int]
    ) -> frozenset[str]:
        """Pinned versions whose end would make ``needed`` fit, those with least ``remaining`` work first."""
        slots, nbytes = self.shortfall(needed)
        pinned = [r for v in self.pool.versions() if (r := residents[v]).num_pins and v not in needed]
        drained: list[str] = []
        for resident in sorted(pinned, key=lambda r: (remaining.get(r.version, 0), r.version)):
            if slots <= 0 and nbytes <= 0:
                break
            drained.append(resident.version)
            slots, nbytes = slots - 1, nbytes - resident.nbytes
        return frozenset(drained)

    def has_room_for(self, nbytes: int) -> bool:
        """Whether one more adapter fits on the device without evicting anything."""
        return self.pool.num_free_slots > 0 and self.pool.free_bytes >= nbytes

    def misfit(self, nbytes: int) -> AdapterUnavailable | None:
        """What is wrong with an adapter of that size, which no eviction could help; None when it fits."""
        for tier, allowed in (("device", self.pool.max_bytes), ("host", self.cache.max_bytes)):
            if nbytes > allowed:
                text = f"it needs {nbytes} bytes of {tier} memory and {allowed} are allowed"
                return AdapterUnavailable(f"{text}; raise --adapter-{tier}-bytes.")
        return None

    def check_fits(self, needed: Mapping[str, Resident]) -> None:
        """Raise ``AdapterUnavailable`` when the versions could not be on an empty device together."""
        nbytes = sum(resident.nbytes for resident in needed.values())
        if len(needed) > self.pool.num_slots or nbytes > self.pool.max_bytes:
            raise AdapterUnavailable(
                f"{len(needed)} adapters of {nbytes} bytes are needed at once; the device has {self.pool.num_slots} "
                f"slots and {self.pool.max_bytes} bytes for adapters. Raise --adapter-device-bytes or compose fewer.",
                param="adapters",
            )

    def may_place_ahead(self, resident: Resident, needed: Mapping[str, Resident], demand: Demand) -> bool:
        """Whether one of ``needed`` fits without evicting what some sequence wants no later."""
        later = [v for v in self.idle.versions() if v not in needed and not demand.is_sooner(v, resident.version)]
        nbytes = sum(self.idle.get(version).nbytes for version in later)
        return self.pool.num_free_slots + len(later) > 0 and self.pool.free_bytes + nbytes >= resident.nbytes

    def host_victims(
        self, newcomer: Resident, residents: Mapping[str, Resident], demand: Demand, keep: Collection[str] = ()
    ) -> list[str] | None:
        """What to evict from the host, sparing ``keep``, so that the newcomer fits; None when not enough may go."""

        def rank(version: str) -> int | None:
            return None if version in keep else demand.eviction_rank(residents[version], newcomer)

        return self.cache.find_room(newcomer.nbytes, rank)

    def take_out(self, resident: Resident) -> Level | None:
        """Out of both tiers; returns the highest one it was in."""
        level: Level | None = None
        if resident.version in self.cache:
            self.cache.pop(resident.version)
            level = "host"
        if resident.slot >= 0:
            self.leave_device(resident)
            level = "device"
        return level

    def leave_device(self, resident: Resident) -> None:
        self.idle.discard(resident)
        self.pool.release(resident.slot)
        resident.slot = -1
        resident.hosted = None
