"""What the engine tells whoever measures it; ``metrics.py`` implements it."""

from __future__ import annotations

from typing import Protocol

from deltaserve.adapters.observer import AdapterObserver, SilentObserver
from deltaserve.core import RequestStats, StepStats


class EngineMetrics(AdapterObserver, Protocol):
    """Called on the engine thread; must return quickly and not raise."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_request(self, stats: RequestStats, adapter_labels: tuple[str, ...], kind: str) -> None:
        """``kind`` is "base", "adapter" or "composition"; ``adapter_labels`` the names of the adapters, if any."""
        ...


class SilentMetrics(SilentObserver):
    """Measures nothing."""

    def on_step(self, stats: StepStats) -> None:
        return None

    def on_request(self, stats: RequestStats, adapter_labels: tuple[str, ...], kind: str) -> None:
        return None
