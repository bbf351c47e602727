"""What a run has measured, as it goes: JSON lines, written at once, so that a section that dies keeps what it had.

Before each measurement a line says that it starts. A measurement that started and has no result is the one that killed
or hung its process: the next process skips it, and everything that is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
STATUSES = ("ok", "wrong", "failed", "not present", "skipped")


class Journal:
    """Appends to ``path``; what the file holds already counts as done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        entries = read(path)
        self._done = {entry["key"] for entry in entries if entry["kind"] != "started"}

    def is_done(self, key: str) -> bool:
        return key in self._done

    def start(self, key: str) -> None:
        self._append({"kind": "started", "key": key})

    def add(self, kind: str, key: str, status: str, fields: Mapping[str, Any], reason: str = "") -> None:
        """One result. ``status`` is one of ``STATUSES``; what is not ok says why."""
        if status not in STATUSES or (status != "ok" and not reason):
            raise ValueError(f"status {status!r} with reason {reason!r}; one of {STATUSES}, reasoned unless ok")
        self._append({"kind": kind, "key": key, "status": status, "reason": reason, **fields})
        self._done.add(key)

    def _append(self, entry: Entry) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[Entry]:
    """All whole lines; a process that was killed may have left half of one."""
    if not path.exists():
        return []
    return list(_whole_lines(path.read_text(encoding="utf-8")))


def _whole_lines(text: str) -> Iterator[Entry]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def unfinished(entries: list[Entry]) -> str | None:
    """The key that started last and has no result."""
    done = {entry["key"] for entry in entries if entry["kind"] != "started"}
    started = [entry["key"] for entry in entries if entry["kind"] == "started"]
    return started[-1] if started and started[-1] not in done else None


class Budget:
    """Seconds that a section has."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    @property
    def is_over(self) -> bool:
        return self.left <= 0.0
