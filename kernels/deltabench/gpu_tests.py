"""Runs the tests marked ``gpu`` with whatever interpreter is there: no plugin is needed, none is loaded."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from deltabench.machine import ROOT

# The project's own settings ask for plugins (time limits) that may be absent, and would then be an error.
SETTINGS = """[pytest]
addopts = --import-mode=importlib --strict-markers -ra -q -p no:cacheprovider
markers = gpu: needs a CUDA device
xfail_strict = true
"""
NOTHING_CHOSEN = 5  # pytest's exit status
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|xfailed)")


@dataclass
class TestResult:
    """``counts``: passed, failed, skipped, error. Good: something passed and nothing failed."""

    __test__ = False

    counts: dict[str, int] = field(default_factory=dict)
    reason: str = ""

    @property
    def is_good(self) -> bool:
        return not self.reason


def files() -> list[Path]:
    """Test files that carry the mark. Others stay unread: they may import what is not installed."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8"):
            found.append(path)
    return found


def run(folder: Path, environment: dict[str, str], seconds: float, *, dry_run: bool) -> TestResult:
    """One process a file, all at once: most of their time is compiling. ``folder`` takes settings and outputs.

    A dry run tries one small test on the host.
    """
    settings = folder / "pytest.ini"
    settings.write_text(SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(settings), f"--rootdir={ROOT}", "-m", "gpu"]
    given = {**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    if dry_run:
        given["DELTASERVE_TEST_DEVICE"] = "cpu"
        command += ["-k", "write_kv"]
    end = time.monotonic() + seconds
    running: list[tuple[Path, subprocess.Popen[bytes]]] = []
    for index, path in enumerate(files()):
        output = folder / f"tests-{index}.txt"
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [*command, str(path)],
                cwd=ROOT,
                env=given,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running.append((output, process))
    result, reasons = TestResult(), []
    for output, process in running:
        reason = _wait(process, end)
        text = output.read_text(encoding="utf-8", errors="replace")
        print(text, flush=True)
        for what, number in counts_of(text).items():
            result.counts[what] = result.counts.get(what, 0) + number
        if reason:
            reasons.append(f"{reason}: {summary_line(text)}")
    if not reasons and not result.counts.get("passed"):
        reasons.append("no test ran")
    result.reason = "; ".join(reasons)
    return result


def _wait(process: subprocess.Popen[bytes], end: float) -> str:
    """Why the process was no success, else "". A file none of whose tests was chosen is no failure."""
    try:
        status = process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "did not end in its time"
    return "" if status in (0, NOTHING_CHOSEN) else f"pytest ended with status {status}"


def summary_line(output: str) -> str:
    return next((line.strip("= ") for line in reversed(output.splitlines()) if _COUNTS.search(line)), "no summary")


def counts_of(output: str) -> dict[str, int]:
    """From pytest's closing line."""
    return {
        what.rstrip("s") if what.startswith("err") else what: int(n)
        for n, what in _COUNTS.findall(summary_line(output))
    }
