"""Runs the tests marked ``gpu`` with whatever interpreter is there: no plugin is needed, none is loaded."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from deltabench.machine import ROOT

# The project's own settings ask for plugins (time limits) that may be absent, and would then be an error.
SETTINGS = """[pytest]
addopts = --import-mode=importlib --strict-markers -ra -q -p no:cacheprovider
markers = gpu: needs a CUDA device
xfail_strict = true
"""
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
    """``folder`` takes the settings file. A dry run tries one small test on the host."""
    settings = folder / "pytest.ini"
    settings.write_text(SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-c", str(settings), f"--rootdir={ROOT}", "-m", "gpu"]
    command += [str(path) for path in files()]
    given = {**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    if dry_run:
        given["DELTASERVE_TEST_DEVICE"] = "cpu"
        command += ["-k", "write_kv"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        print(output)
        return TestResult(counts_of(output), f"did not end within {seconds:.0f} s")
    print(output, flush=True)
    counts = counts_of(output)
    if process.returncode != 0:
        return TestResult(counts, f"pytest ended with status {process.returncode}: {summary_line(output)}")
    if not counts.get("passed"):
        return TestResult(counts, "no test ran")
    return TestResult(counts)


def summary_line(output: str) -> str:
    return next((line.strip("= ") for line in reversed(output.splitlines()) if _COUNTS.search(line)), "no summary")


def counts_of(output: str) -> dict[str, int]:
    """From pytest's closing line."""
    return {
        what.rstrip("s") if what.startswith("err") else what: int(n)
        for n, what in _COUNTS.findall(summary_line(output))
    }
