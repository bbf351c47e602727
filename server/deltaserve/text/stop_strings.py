"""Stop strings in streamed text: nothing that may still become one is let out."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Filters the text of one sequence; the outcome does not depend on how the text was cut into pieces.

    The match that ends first wins; of two that end together, the longer. ``include`` keeps the matched string in the
    output (``include_stop_str_in_output``).
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Adds text and returns what may be shown now. After a match everything further is swallowed."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        buffer = self._held + text
        match = self._first_match(buffer)
        if match is not None:
            start, self.matched = match
            self._held = ""
            return buffer[: start + len(self.matched)] if self._include else buffer[:start]
        keep = self._possible_prefix(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """The text held back, once no more can come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str) -> tuple[int, str] | None:
        found = ((buffer.find(stop), stop) for stop in self._stops)
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop

    def _possible_prefix(self, buffer: str) -> int:
        """Length of the longest end of ``buffer`` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest
