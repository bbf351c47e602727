"""The two sides of ``offline.py``, each a process that lives for the whole run, and what they take of the processor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltaserve.openmp import let_threads_sleep
from loadtest.lean_client import Plan, run_closed_loop
from loadtest.peers.peer import PeerFailed

SERVE = ("-c", "from deltaserve.cli import main; main()", "serve", "--port", "0", "--no-demo-adapters")
WORK = ("-m", "loadtest.offline_worker")


class Offline:
    """The engine in a process of its own (``offline_worker.py``), fed token ids by lines of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.vocab_size: int = self._read()["vocab_size"]

    def run(self, plan: Plan) -> dict[str, Any]:
        before = cpu_seconds(self._process.pid)
        opened(self._process.stdin).write(json.dumps(plan) + "\n")
        opened(self._process.stdin).flush()
        result = self._read()
        return {**result, "cpu_seconds": cpu_seconds(self._process.pid) - before}

    def _read(self) -> dict[str, Any]:
        line = opened(self._process.stdout).readline()
        if not line:
            raise PeerFailed("the offline engine has died; its words are above, or in --work")
        return json.loads(line)


class OverHttp:
    """``deltaserve serve``, as a user starts it, asked by the leanest client."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._pid = process.pid
        found = re.search(r" on http://127\.0\.0\.1:(\d+)", opened(process.stdout).readline())
        if found is None:
            raise PeerFailed("the server did not start; its words are above, or in --work")
        self.port = int(found[1])

    def run(self, plan: Plan) -> dict[str, Any]:
        loop_before, all_before = cpu_seconds(self._pid, self._pid), cpu_seconds(self._pid)
        result = asdict(run_closed_loop(self.port, plan))
        # The event loop runs on the main thread, whose id is the process's.
        result["event_loop_cpu_seconds"] = cpu_seconds(self._pid, self._pid) - loop_before
        return {**result, "cpu_seconds": cpu_seconds(self._pid) - all_before}


def opened(pipe: Any) -> Any:
    if pipe is None:
        raise RuntimeError("the process was started without pipes")
    return pipe


def cpu_seconds(pid: int, thread: int | None = None) -> float:
    """CPU time of a process's thread, or of all its present threads; 0 where the system does not tell."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*" if thread is None else str(thread)):
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            continue
    return total / 1e9


@contextmanager
def child(words: Sequence[str], threads: int, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of this Python whose pipes are text; it is ended, however this ends. What it logs goes to ``log``."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    let_threads_sleep(environment)  # both sides wait as the server does
    with log.open("w") as words_of_it:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words_of_it,
            text=True,
            env=environment,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            opened(pipe).close()
