"""What crosses between the event loop and the engine thread: frozen, and every class pickles, so that the engine can
move into a process of its own without a redesign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deltaserve.core import Binding, GenerationRequest, Logits, RequestOutput
from deltaserve.errors import AdapterUnavailable, DeltaserveError

# ---------------------------------------------------------------- to the engine


@dataclass(frozen=True, slots=True)
class Submit:
    """``arrival_seconds`` is on the machine-wide monotonic clock, as everywhere here."""

    request: GenerationRequest
    arrival_seconds: float


@dataclass(frozen=True, slots=True)
class Probe:
    probe_id: str
    prompt_ids: tuple[int, ...]
    binding: Binding
    arrival_seconds: float


@dataclass(frozen=True, slots=True)
class Abort:
    """Of a request or probe."""

    request_id: str


@dataclass(frozen=True, slots=True)
class StopSequence:
    """A stop string ended sequence ``index``."""

    request_id: str
    index: int


@dataclass(frozen=True, slots=True)
class Publish:
    """The names changed. ``labels`` gives the name under which a version is measured."""

    added: tuple[str, ...]
    retired: tuple[str, ...]
    incompatible: Mapping[str, str]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class AddCandidate:
    version: str


@dataclass(frozen=True, slots=True)
class DropCandidate:
    version: str


@dataclass(frozen=True, slots=True)
class Preload:
    version: str


@dataclass(frozen=True, slots=True)
class Unload:
    version: str


@dataclass(frozen=True, slots=True)
class Retire:
    version: str


@dataclass(frozen=True, slots=True)
class Wake:
    """A worker finished something."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """End the loop after this step; whatever is open gets ``reason``."""

    reason: str


Message = (
    Submit
    | Probe
    | Abort
    | StopSequence
    | Publish
    | AddCandidate
    | DropCandidate
    | Preload
    | Unload
    | Retire
    | Wake
    | Shutdown
)

# ---------------------------------------------------------------- from the engine


@dataclass(frozen=True, slots=True)
class Failed:
    """A request or probe ended with an error that its sender hears."""

    request_id: str
    error: DeltaserveError


@dataclass(frozen=True, slots=True)
class Probed:
    probe_id: str
    logits: Logits


@dataclass(frozen=True, slots=True)
class Settled:
    """A preload is as far as it gets; ``error`` when the version cannot be served."""

    version: str
    error: AdapterUnavailable | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """All that one step has to tell. ``ended`` comes once, last: every request still open gets this error."""

    outputs: tuple[RequestOutput, ...] = ()
    failed: tuple[Failed, ...] = ()
    probed: tuple[Probed, ...] = ()
    settled: tuple[Settled, ...] = field(default=())
    ended: DeltaserveError | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.outputs or self.failed or self.probed or self.settled or self.ended)
