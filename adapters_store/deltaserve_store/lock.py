"""One process serves a store: an exclusive ``flock`` on a file that says who holds it.

The kernel drops the lock with the process, also after kill -9, so there is no stale lock to judge. The file's text is
for people and for commands that want to know where the server listens.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from deltaserve_store.errors import StoreLocked

LOCK_NAME = "lock"
MAX_LOCK_BYTES = 4096


class StoreLock:
    """Held from construction to ``release``. Raises ``StoreLocked`` when another process holds it."""

    def __init__(self, folder: Path, *, url: str | None = None) -> None:
        self._path = folder / LOCK_NAME
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            holder = read_lock(folder)
            url, pid = holder.get("url"), holder.get("pid")
            where = f" at {url}" if url else ""
            advice = "send commands there" if url else "stop it first"
            raise StoreLocked(
                f"the store is in use by process {pid}{where}; {advice}, or choose another --store", url=url, pid=pid
            ) from None
        except BaseException:
            os.close(self._descriptor)
            raise
        self.set_url(url)

    def set_url(self, url: str | None) -> None:
        """Tells where the holder listens, once it does."""
        data = json.dumps({"pid": os.getpid(), "url": url}).encode()
        os.pwrite(self._descriptor, data.ljust(MAX_LOCK_BYTES // 8), 0)
        os.ftruncate(self._descriptor, MAX_LOCK_BYTES // 8)

    def release(self) -> None:
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1


def read_lock(folder: Path) -> dict[str, Any]:
    """``{"pid", "url"}`` as the holder wrote it; empty when there is none or it is being written."""
    try:
        with open(folder / LOCK_NAME, "rb") as file:
            data = json.loads(file.read(MAX_LOCK_BYTES))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
