"""What waiting sequences want, soonest first: decides what is loaded next and what may be evicted for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from deltaserve.adapters.host_cache import GOES_FIRST
from deltaserve.adapters.resident import Resident
from deltaserve.core import AdapterState


class Demand:
    """Replaced at every step by the scheduler's plan."""

    def __init__(self, wanted: Iterable[str] = ()) -> None:
        self._order = {version: index for index, version in enumerate(dict.fromkeys(wanted))}

    def __contains__(self, version: str) -> bool:
        return version in self._order

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def lateness(self, version: str) -> int:
        """How far back in the queue the version is wanted first. Raises ``KeyError`` when nobody wants it."""
        return self._order[version]

    def is_sooner(self, version: str, other: str) -> bool:
        """Whether ``version`` is wanted, and before ``other``."""
        own, others = self._order.get(version), self._order.get(other)
        return own is not None and (others is None or own < others)

    def eviction_rank(self, hosted: Resident, newcomer: Resident) -> int | None:
        """When ``hosted`` goes from the host to make room for ``newcomer``: lowest first, None never.

        What nobody waits for goes first, then what is wanted later than the newcomer; so the adapter of the oldest
        waiting sequence always finds room and never loses it to a younger one's.
        """
        if hosted.state is AdapterState.LOADING:
            return None  # being copied to the device
        wanted = self._order.get(hosted.version)
        if wanted is None:
            return GOES_FIRST
        own = self._order.get(newcomer.version)
        return -wanted if own is not None and wanted > own else None
