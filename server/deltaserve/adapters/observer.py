"""What residency tells whoever measures it (``metrics.py``)."""

from __future__ import annotations

from typing import Literal, Protocol


class AdapterObserver(Protocol):
    """Called on the engine thread; must return quickly and not raise."""

    def on_adapter_load(
        self, source: Literal["disk", "host"], outcome: Literal["ok", "failed"], seconds: float
    ) -> None: ...

    def on_adapter_eviction(self, level: Literal["host", "device"], reason: str) -> None: ...


class SilentObserver:
    """Measures nothing."""

    def on_adapter_load(
        self, source: Literal["disk", "host"], outcome: Literal["ok", "failed"], seconds: float
    ) -> None:
        return None

    def on_adapter_eviction(self, level: Literal["host", "device"], reason: str) -> None:
        return None
