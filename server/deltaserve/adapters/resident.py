"""One version as residency knows it. Only ``residency.py`` writes to it."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.adapters.host_cache import HostedAdapter
from deltaserve.core import AdapterState, AdapterStatus
from deltaserve.deltas.composition import Traits
from deltaserve.errors import AdapterUnavailable

UNUSABLE = (AdapterState.FAILED, AdapterState.INCOMPATIBLE, AdapterState.RETIRED)
ON_HOST = (AdapterState.HOST, AdapterState.READY)


@dataclass(slots=True, eq=False)
class Resident:
    """``slot`` is -1 without a place on the device; ``nbytes`` 0 until the first load has told it.

    ``num_pins`` counts parts of running sequences, ``num_holds`` of running and waiting ones. ``hosted`` holds the
    adapter while it is on a device that shares the host's memory: it is in no other tier then. ``traits`` are known
    from the first load on.
    """

    version: str
    state: AdapterState = AdapterState.STORED
    reason: str | None = None
    nbytes: int = 0
    slot: int = -1
    num_pins: int = 0
    num_holds: int = 0
    hosted: HostedAdapter | None = None
    traits: Traits | None = None
    last_used: float | None = None
    failed_at: float = 0.0
    was_prepared: bool = False
    is_retiring: bool = False
    is_unloading: bool = False
    is_forgotten: bool = False
    at_rest: AdapterStatus | None = None  # what ``status`` last told of a version that was never loaded

    @property
    def is_over(self) -> bool:
        """Neither a name nor a sequence asks for it."""
        return self.is_retiring and not self.num_holds

    @property
    def is_unwanted(self) -> bool:
        """It leaves memory as soon as nothing pins it."""
        return self.is_unloading or self.is_over

    def status(self, now: float, *, is_hosted: bool) -> AdapterStatus:
        if not self.nbytes and self.last_used is None:
            # Most of thousands of versions: told at every scrape and every look at readiness, so not made anew.
            told = self.at_rest
            if told is None or told.state is not self.state or told.reason != self.reason:
                told = self.at_rest = AdapterStatus(self.version, self.state, self.reason)
            return told
        return AdapterStatus(
            version=self.version,
            state=self.state,
            reason=self.reason,
            host_bytes=self.nbytes if is_hosted else 0,
            device_bytes=self.nbytes if self.slot >= 0 else 0,
            num_pins=self.num_pins,
            last_used_seconds_ago=None if self.last_used is None else max(0.0, now - self.last_used),
        )

    def unavailable(self, retry_in: float, param: str = "model") -> AdapterUnavailable:
        """What a request for this unusable version is told; ``param`` is the field that asks for it."""
        name = self.version[:12]
        if self.state is AdapterState.FAILED:
            text = f"The adapter version {name} could not be loaded: {self.reason}"
            return AdapterUnavailable(text, param=param, retry_after_seconds=max(1.0, round(retry_in, 1)))
        if self.state is AdapterState.INCOMPATIBLE:
            text = f"The adapter version {name} belongs to another base model: {self.reason}"
            return AdapterUnavailable(text, param=param)
        return AdapterUnavailable(f"The adapter version {name} is no longer served.", param=param)

    def problem(self, *, is_hosted: bool, is_idle: bool) -> str | None:
        """What is wrong with this entry's books, if anything."""
        if self.num_pins < 0:
            return f"{self.num_pins} pins"
        if (self.state is AdapterState.READY) != (self.slot >= 0) and self.state is not AdapterState.LOADING:
            return f"slot {self.slot}"
        if is_idle != (self.state is AdapterState.READY and self.num_pins == 0):
            return f"idle {is_idle} with {self.num_pins} pins"
        if self.num_pins and self.state is not AdapterState.READY:
            return f"{self.num_pins} pins"
        if self.state is AdapterState.HOST and not is_hosted:
            return "missing from the host cache"
        if is_hosted and self.state not in (*ON_HOST, AdapterState.LOADING):
            return "still in the host cache"
        if self.hosted is not None and (self.slot < 0 or is_hosted):
            return "booked in two tiers"
        return None
