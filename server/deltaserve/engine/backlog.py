"""How long a full queue will stay full, from how fast requests have been ending."""

from __future__ import annotations

from collections import deque

_WINDOW = 64
_SHORTEST_SECONDS, _LONGEST_SECONDS = 1.0, 60.0


class Backlog:
    """Remembers when the last requests ended."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=_WINDOW)

    def note_end(self, now: float) -> None:
        self._ends.append(now)

    def retry_after(self, num_queued: int, now: float) -> float:
        """Seconds after which a tenth of the queue should have gone, between 1 and 60."""
        if len(self._ends) < 2:
            return _SHORTEST_SECONDS
        rate = len(self._ends) / max(now - self._ends[0], 1e-3)
        return round(min(max(0.1 * num_queued / rate, _SHORTEST_SECONDS), _LONGEST_SECONDS), 1)
