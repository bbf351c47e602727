"""Where each adapter version is, and the only file that changes it.

    STORED --load--> LOADING --> HOST <--place/evict--> READY    (in a slot; pinned by running sequences)
       ^                |
       '-- retry -- FAILED(reason)        INCOMPATIBLE(reason)    RETIRED (no name asks for it any more)

Everything here runs on the engine thread; reading, preparing and copying run on worker threads, whose results ``poll``
applies between two steps. A host adapter on its way to a CUDA device is LOADING again. On a CPU the tiers share
memory: a placed adapter leaves the host cache's books.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from deltaserve.adapters.audit import audit
from deltaserve.adapters.demand import Demand
from deltaserve.adapters.device_pool import DevicePool, StagedAdapter
from deltaserve.adapters.fault import describe
from deltaserve.adapters.host_cache import HostCache, HostedAdapter
from deltaserve.adapters.loader import NotPrepared
from deltaserve.adapters.observer import AdapterObserver, SilentObserver
from deltaserve.adapters.resident import ON_HOST, UNUSABLE, Resident, Traits
from deltaserve.adapters.tiers import Tiers
from deltaserve.adapters.workers import AdapterLoader, Loaded, LoadWorkers, Prepared, Staged
from deltaserve.core import AdapterState, AdapterStatus
from deltaserve.errors import AdapterUnavailable
from deltaserve_store.errors import BaseMismatch

MAX_PLACING_SECONDS = 0.005
"""Writing an adapter's table entries takes the step loop's time: after this much, the rest waits for the next step."""


class AdapterResidency:
    """The state machine. ``retry_seconds``: how long a failure stands before a request may cause another try."""

    def __init__(
        self,
        pool: DevicePool,
        cache: HostCache,
        loader: AdapterLoader,
        *,
        num_load_threads: int = 1,
        retry_seconds: float = 5.0,
        observer: AdapterObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = pool
        self.cache = cache
        self.workers = LoadWorkers(loader, pool, num_load_threads)
        self.observer: AdapterObserver = observer or SilentObserver()
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._residents: dict[str, Resident] = {}
        self._tiers = Tiers(pool, cache)
        self._demand = Demand()
        self._placing_seconds = 0.0

    # ------------------------------------------------------------ for sequences

    def hold(self, versions: Sequence[str]) -> None:
        """A new sequence will want the versions: they stay servable until ``unhold``, also when retired meanwhile.

        A failure that is old enough is forgotten, so that the load is tried again.
        """
        for version in versions:
            resident = self._resident(version)
            resident.num_holds += 1
            if resident.state is AdapterState.FAILED and self._retry_in(resident) <= 0:
                self._set(resident, AdapterState.STORED)

    def unhold(self, versions: Sequence[str]) -> None:
        """The sequence ended; undo one ``hold``."""
        for version in versions:
            resident = self._residents[version]
            resident.num_holds -= 1
            self._drop_unwanted(resident)

    def acquire(self, versions: Sequence[str]) -> tuple[int, ...] | None:
        """Pin all versions on the device and return their slots; None, and nothing pinned, when that cannot be now.

        Raises ``AdapterUnavailable`` when one of them cannot be served at all.
        """
        residents = [self._resident(version) for version in versions]
        for index, resident in enumerate(residents):
            if resident.state in UNUSABLE:
                param = "model" if len(residents) == 1 else f"adapters[{index}].id"
                raise resident.unavailable(self._retry_in(resident), param)
        if not self._place(residents):
            return None
        for resident in residents:
            self._tiers.idle.discard(resident)
            resident.num_pins += 1
            resident.last_used = self._clock()
        return tuple(resident.slot for resident in residents)

    def release(self, versions: Sequence[str]) -> None:
        """Undo one ``acquire``."""
        for version in versions:
            resident = self._residents[version]
            resident.num_pins -= 1
            resident.last_used = self._clock()
            if resident.num_pins == 0:
                self._tiers.idle.add(resident)
                self._drop_unwanted(resident)

    def plan(self, wanted: Iterable[str]) -> None:
        """Tell which versions waiting sequences want, soonest first; starts their loads as far as there is room."""
        self._demand = Demand(wanted)
        self._placing_seconds = 0.0
        for resident in map(self._resident, self._demand):
            if not self.workers.has_room:
                return
            if (
                resident.state is AdapterState.STORED
                and self._tiers.host_victims(resident, self._residents, self._demand) is not None
            ):
                self._start_load(resident)

    def must_drain(self, versions: Sequence[str], remaining: Mapping[str, int]) -> frozenset[str] | None:
        """Pinned versions that must come free before ``versions`` fit, those with least ``remaining`` work first.

        None while room is not what ``versions`` lack (a load is under way).
        """
        needed = {version: self._resident(version) for version in versions}
        if any(resident.state not in ON_HOST for resident in needed.values()):
            return None
        return self._tiers.to_drain(needed, self._residents, remaining)

    def is_pinned(self, version: str) -> bool:
        return self._resident(version).num_pins > 0

    # ------------------------------------------------------------ for the store and the operator

    def publish(self, added: Sequence[str], retired: Iterable[str], incompatible: Mapping[str, str] | None) -> None:
        """Names changed: ``added`` may be asked for, ``retired`` no longer; ``incompatible`` maps versions to reasons.

        Failures are forgotten (with ``incompatible`` None only those of ``added``). A retired version that sequences
        still use stays until the last of them ends.
        """
        for version in added:
            resident = self._resident(version)
            resident.is_retiring = resident.is_forgotten = False
        for version in added if incompatible is None else self._residents:
            resident = self._residents[version]
            if resident.state in UNUSABLE and not resident.is_retiring:
                self._set(resident, AdapterState.STORED)
        for version, reason in (incompatible or {}).items():
            if self._resident(version).state is AdapterState.STORED:
                self._set(self._resident(version), AdapterState.INCOMPATIBLE, reason)
        for version in retired:
            self.retire(version)

    def retire(self, version: str, *, forget: bool = False) -> None:
        """No new request may use the version; memory, with ``forget`` the listing too, is freed when the last ends."""
        resident = self._resident(version)
        resident.is_retiring = True
        resident.is_forgotten = forget
        self._drop_unwanted(resident)

    def unload(self, version: str) -> None:
        """Free the version's memory as soon as nothing pins it; the next request loads it again."""
        resident = self._resident(version)
        resident.is_unloading = resident.state in (*ON_HOST, AdapterState.LOADING)
        self._drop_unwanted(resident)

    def settle(self, version: str) -> bool:
        """Push a version towards the device without a sequence; True once it can be pushed no further."""
        resident = self._resident(version)
        if resident.state is AdapterState.STORED:
            if self.workers.has_room and self._tiers.host_victims(resident, self._residents, self._demand) is not None:
                self._start_load(resident)
        elif resident.state is AdapterState.HOST:
            self._place([resident])
        return resident.state not in (AdapterState.STORED, AdapterState.LOADING)

    def traits(self, version: str) -> Traits | None:
        """What compositions are judged by; None before the first load."""
        return self._resident(version).traits

    def state(self, version: str) -> AdapterState:
        return self._resident(version).state

    def failure(self, version: str) -> AdapterUnavailable | None:
        """The error that a request for the version would get now, if any."""
        resident = self._resident(version)
        return resident.unavailable(self._retry_in(resident)) if resident.state in UNUSABLE else None

    def status(self) -> tuple[AdapterStatus, ...]:
        """Every known version. Callable from any thread: it only reads, and may be a step old."""
        now = self._clock()
        return tuple(r.status(now, is_hosted=r.version in self.cache) for r in list(self._residents.values()))

    # ------------------------------------------------------------ results of the workers

    def poll(self) -> None:
        """Apply what the workers finished since the last call."""
        for done in self.workers.finished():
            resident = self._residents[done.version]
            is_unprepared = isinstance(done.error, NotPrepared) and not resident.was_prepared
            if resident.is_unwanted:
                self._drop(resident)
            elif isinstance(done, Prepared) and done.error is None:
                self.workers.start_load(resident.version)
            elif is_unprepared and self.workers.prepare is not None:
                resident.was_prepared = True
                self.workers.start_prepare(resident.version)
            elif done.error is not None:
                self._fail(resident, done.error, done.seconds)
            elif isinstance(done, Loaded) and done.adapter is not None:
                self._host(resident, done.adapter, done.seconds)
            elif isinstance(done, Staged) and done.staged is not None:
                self._install(resident, done.staged, time.perf_counter() - done.seconds)

    def _start_load(self, resident: Resident) -> None:
        self._set(resident, AdapterState.LOADING)
        resident.was_prepared = False
        self.workers.start_load(resident.version)

    def _host(self, resident: Resident, adapter: HostedAdapter, seconds: float) -> None:
        """A load ended well: keep the adapter on the host if there is, or can be made, room."""
        resident.nbytes, resident.traits = adapter.nbytes, adapter.traits
        misfit = self._tiers.misfit(adapter.nbytes)
        if misfit is not None:
            self._fail(resident, misfit, seconds)
            return
        self.observer.on_adapter_load("disk", "ok", seconds)
        # Without room, others are wanted sooner. Its size is known now, so it is not read again before there is room.
        self._set(resident, AdapterState.STORED)
        self._return_to_host(resident, adapter)

    def _install(self, resident: Resident, staged: StagedAdapter, began: float) -> None:
        try:
            self.pool.install(resident.slot, staged)
        except Exception as error:
            self._fail(resident, error, time.perf_counter() - began)
            return
        if self.pool.shares_host_memory:
            resident.hosted = self.cache.pop(resident.version)
        self._set(resident, AdapterState.READY)
        self._tiers.idle.add(resident)
        self.observer.on_adapter_load("host", "ok", time.perf_counter() - began)

    def _fail(self, resident: Resident, error: BaseException, seconds: float) -> None:
        self._tiers.take_out(resident)
        resident.failed_at = self._clock()
        state = AdapterState.INCOMPATIBLE if isinstance(error, BaseMismatch) else AdapterState.FAILED
        self._set(resident, state, describe(error))
        self.observer.on_adapter_load("disk", "failed", seconds)

    # ------------------------------------------------------------ tiers

    def _place(self, residents: Sequence[Resident]) -> bool:
        """Bring every resident into a slot, evicting idle ones; True when all are READY. Nothing is evicted in vain."""
        needed = {resident.version: resident for resident in residents}
        self._tiers.check_fits(needed)
        if any(resident.state not in ON_HOST for resident in needed.values()):
            self._place_ahead(needed)
            return False
        if max(self._tiers.shortfall(needed)) > 0:
            return False
        if self._placing_seconds > MAX_PLACING_SECONDS and any(r.slot < 0 for r in needed.values()):
            return False
        for resident in needed.values():
            if resident.state is AdapterState.HOST:
                self._make_device_room(resident.nbytes, needed)
                self._move_to_device(resident)
        return all(resident.state is AdapterState.READY for resident in needed.values())

    def _place_ahead(self, needed: Mapping[str, Resident]) -> None:
        """Bring what is on the host already to the device, unpinned: the host may be too small for all at once."""
        for resident in needed.values():
            if resident.state is AdapterState.HOST and self._tiers.may_place_ahead(resident, needed, self._demand):
                self._make_device_room(resident.nbytes, needed)
                self._move_to_device(resident)

    def _make_device_room(self, nbytes: int, keep: Collection[str]) -> None:
        while not self._tiers.has_room_for(nbytes):
            self._evict_from_device(self._tiers.idle.victim(keep, self._demand), keep)

    def _evict_from_device(self, victim: Resident, keep: Collection[str]) -> None:
        hosted = victim.hosted
        self._tiers.leave_device(victim)
        self._set(victim, AdapterState.HOST if victim.version in self.cache else AdapterState.STORED)
        if hosted is not None:
            self._return_to_host(victim, hosted, keep)
        self.observer.on_adapter_eviction("device", "capacity")

    def _move_to_device(self, resident: Resident) -> None:
        hosted = self.cache.get(resident.version)
        resident.slot = self.pool.reserve(resident.version, resident.nbytes)
        if self.pool.shares_host_memory:
            began = time.perf_counter()
            self._install(resident, hosted.terms, began)
            self._placing_seconds += time.perf_counter() - began
        else:
            self._set(resident, AdapterState.LOADING)
            self.workers.start_staging(resident.version, hosted)

    def _return_to_host(self, resident: Resident, adapter: HostedAdapter, keep: Collection[str] = ()) -> None:
        """STORED -> HOST if room can be made without touching ``keep``."""
        victims = self._tiers.host_victims(resident, self._residents, self._demand, keep)
        if victims is None:
            return
        for version in victims:
            self.cache.pop(version)
            if self._residents[version].state is AdapterState.HOST:
                self._set(self._residents[version], AdapterState.STORED)
            self.observer.on_adapter_eviction("host", "capacity")
        self.cache.put(resident.version, adapter)
        self._set(resident, AdapterState.HOST)

    def _drop_unwanted(self, resident: Resident) -> None:
        if resident.is_unwanted and not resident.num_pins and resident.state is not AdapterState.LOADING:
            self._drop(resident)

    def _drop(self, resident: Resident) -> None:
        """Out of both tiers; RETIRED when neither name nor sequence asks for it, else STORED."""
        level = self._tiers.take_out(resident)
        if level is not None:
            self.observer.on_adapter_eviction(level, "retired" if resident.is_retiring else "unloaded")
        resident.is_unloading = False
        self._set(resident, AdapterState.RETIRED if resident.is_over else AdapterState.STORED)
        if resident.is_over and resident.is_forgotten:
            del self._residents[resident.version]

    # ------------------------------------------------------------ bookkeeping

    def _set(self, resident: Resident, state: AdapterState, reason: str | None = None) -> None:
        resident.state = state
        resident.reason = reason

    def _resident(self, version: str) -> Resident:
        return self._residents.get(version) or self._residents.setdefault(version, Resident(version))

    def _retry_in(self, resident: Resident) -> float:
        return max(0.0, resident.failed_at + self._retry_seconds - self._clock())

    @property
    def is_loading(self) -> bool:
        return self.workers.num_in_flight > 0

    def close(self) -> None:
        """Stop the workers; loads under way are abandoned."""
        self.workers.close()

    def check_integrity(self, pins: Mapping[str, int] | None = None) -> None:
        """Raise ``RuntimeError`` when slots, bytes, pins or states disagree; ``pins`` is the scheduler's own count."""
        audit(list(self._residents.values()), self.pool, self.cache, self._tiers.idle, pins)
