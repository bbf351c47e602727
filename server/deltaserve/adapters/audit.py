"""The books of residency must balance: slots, bytes, pins and states."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from deltaserve.adapters.device_pool import DevicePool
from deltaserve.adapters.host_cache import HostCache
from deltaserve.adapters.idle import IdleAdapters
from deltaserve.adapters.resident import Resident


def audit(
    residents: Collection[Resident],
    pool: DevicePool,
    cache: HostCache,
    idle: IdleAdapters,
    pins: Mapping[str, int] | None,
) -> None:
    """Raise ``RuntimeError`` at the first disagreement; ``pins`` is the scheduler's own count by version."""
    pool.check_integrity()
    cache.check_integrity()
    idle.check_integrity()
    for resident in residents:
        problem = resident.problem(is_hosted=resident.version in cache, is_idle=resident.version in idle)
        if problem is None and pins is not None and resident.num_pins != pins.get(resident.version, 0):
            problem = f"{resident.num_pins} pins booked, {pins.get(resident.version, 0)} running parts hold one"
        if problem is not None:
            raise RuntimeError(f"adapter {resident.version[:24]} is {resident.state}: {problem}")
    _same("slots", (r.version for r in residents if r.slot >= 0), pool.versions())
    _same("host entries", (r.version for r in residents if r.version in cache), cache.versions())


def _same(what: str, claimed: Iterable[str], held: Iterable[str]) -> None:
    if sorted(claimed) != sorted(held):
        raise RuntimeError(f"{what} and the versions that claim them differ")
