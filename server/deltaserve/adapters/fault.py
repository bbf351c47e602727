"""An unexpected error as text for a client or a log line: what happened, but no path of this machine."""

from __future__ import annotations

import re

from deltaserve.errors import DeltaserveError
from deltaserve_store.errors import StoreError

_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][\w.@+~-]+){2,}[/\\]?")
_MAX_TEXT = 300


def describe(error: BaseException) -> str:
    """Typed errors say it themselves; others are cut to one line, with paths left out."""
    if isinstance(error, (DeltaserveError, StoreError)):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    text = _PATH.sub("<path>", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:_MAX_TEXT]}" if text else type(error).__name__
