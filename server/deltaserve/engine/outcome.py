"""What a step hands to whoever runs the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from deltaserve.core import Logits, RequestOutput, RequestStats, StepStats
from deltaserve.errors import DeltaserveError


@dataclass(slots=True)
class Outcome:
    """``outputs`` of requests, ``failures`` (request or probe id, error), ``probes`` that ended well, ``finished``
    requests with their labels for metrics, and ``stats`` of the step, None when it had nothing to compute."""

    outputs: list[RequestOutput] = field(default_factory=list)
    failures: list[tuple[str, DeltaserveError]] = field(default_factory=list)
    probes: list[tuple[str, Logits]] = field(default_factory=list)
    finished: list[tuple[RequestStats, tuple[str, ...]]] = field(default_factory=list)
    stats: StepStats | None = None
