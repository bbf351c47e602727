"""`make gpu`: the tests that need a GPU, every operator against its floor and its competitors, whole decode steps.

Each section is a process of its own with a share of the budget, so that a fault or a hang on the device costs one
measurement and not the run; what the budget does not reach is named. Ends in one JSON record and one table.

Exit status: 0, also when a goal is missed; 1 when a result is wrong, a test fails or a section breaks; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from deltabench import gpu_tests, report
from deltabench.journal import Journal, read, unfinished
from deltabench.kernel_section import DEVICE_LOST
from deltabench.machine import ROOT, commit
from deltabench.points import FULL

MAX_RESTARTS = 6
WARM_SECONDS = 60.0


@dataclass(frozen=True)
class Stage:
    """A section with the seconds it may take, those that must be left for the sections behind it, and how long it may
    go without a new line in the journal before it counts as hung (a first call that compiles takes some)."""

    name: str
    seconds: float
    kept_behind: float
    stall: float = 60.0


# In order; the times of a first run, compiling included, on a machine that has never run this.
STAGES = (
    Stage("tests", 140.0, 270.0),
    Stage("rates", 40.0, 240.0),
    Stage("warm", WARM_SECONDS, 210.0),
    Stage("lora", 120.0, 130.0),
    Stage("decode", 110.0, 40.0, stall=90.0),
    Stage("sparse", 45.0, 20.0),
    Stage("decode-sparse", 60.0, 0.0, stall=90.0),
)


@dataclass
class Outcome:
    """How a stage ended. ``ok``: all it was to do was tried; ``skipped``: not begun; ``broken``: says why."""

    name: str
    status: str
    seconds: float
    reason: str = ""


class Run:
    """One run: its journal, its clock, what its stages came to."""

    def __init__(self, folder: Path, device: str, dry_run: bool, budget: float) -> None:
        self.folder, self.device, self.dry_run, self.budget = folder, device, dry_run, budget
        self.journal = folder / "journal.jsonl"
        self.outcomes: list[Outcome] = []
        self._started = time.monotonic()

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self._started)

    def stage(self, stage: Stage) -> None:
        allowed = min(stage.seconds, self.left - stage.kept_behind) if not self.dry_run else self.left
        if allowed < min(15.0, stage.seconds / 2):
            self._end(stage.name, "skipped", 0.0, f"{self.left:.0f} s of the budget are left, kept for what follows")
            return
        print(f"== {stage.name} ({allowed:.0f} s)", flush=True)
        began = time.monotonic()
        if stage.name == "tests":
            status, reason = self._tests(allowed)
        elif stage.name == "warm":
            status, reason = self._warm(allowed)
        else:
            status, reason = self._section(stage, allowed)
        self._end(stage.name, status, time.monotonic() - began, reason)

    def _end(self, name: str, status: str, seconds: float, reason: str) -> None:
        self.outcomes.append(Outcome(name, status, round(seconds, 1), reason))
        print(f"   {name}: {status} in {seconds:.0f} s{f' ({reason})' if reason else ''}", flush=True)

    def _tests(self, seconds: float) -> tuple[str, str]:
        result = gpu_tests.run(self.folder, environment(self.device), seconds, dry_run=self.dry_run)
        Journal(self.journal).add("tests", "tests", "ok" if result.is_good else "failed", result.counts, result.reason)
        return ("ok", "") if result.is_good else ("broken", result.reason)

    def _warm(self, seconds: float) -> tuple[str, str]:
        """Compile in several processes at once what the next sections need. Whatever goes wrong shows up there."""
        if self.device == "cpu":
            return "skipped", "nothing is compiled on the host"
        began = time.monotonic()
        names = [(name, group.name) for name in ("lora", "sparse") for group in FULL.shape.groups]
        running = [
            self._start(name, seconds, self.folder / f"warm-{name}-{group}.jsonl", "--warm", "--groups", group)
            for name, group in names
        ]
        for process in running:
            try:
                process.wait(max(0.1, seconds - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                kill(process)
        return "ok", ""

    def _section(self, stage: Stage, seconds: float) -> tuple[str, str]:
        """Run a section, again and again behind what killed or hung it, while there is time."""
        end = time.monotonic() + seconds
        for _ in range(MAX_RESTARTS):
            process = self._start(stage.name, max(5.0, end - time.monotonic()), self.journal)
            try:
                hung = self._watch(process, end + 20.0, stage.stall)
            finally:
                kill(process)
            if not hung and process.returncode == 0:
                return "ok", ""
            guilty = unfinished(read(self.journal))
            if guilty is None:
                if process.returncode == DEVICE_LOST:
                    continue  # said so in the journal itself
                return "broken", hung or f"exit status {process.returncode}"
            why = hung or f"ended its process with status {process.returncode}"
            Journal(self.journal).add(kind_of(stage.name), guilty, "failed", {}, why)
            if end - time.monotonic() < 5.0:
                return "broken", f"{guilty}: {why}"
        return "broken", f"{MAX_RESTARTS} processes ended early"

    def _start(self, name: str, seconds: float, journal: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(ROOT / "kernels" / "bench.py"), "section", name, "--journal", str(journal)]
        command += ["--seconds", f"{seconds:.0f}", "--device", self.device, *more]
        if self.dry_run:
            command.append("--dry-run")
        return subprocess.Popen(command, cwd=ROOT, env=environment(self.device), start_new_session=True)

    def _watch(self, process: subprocess.Popen[bytes], end: float, stall: float) -> str:
        """Wait; "" when it ended by itself, else why it was killed."""
        size, changed = -1, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            found = self.journal.stat().st_size if self.journal.exists() else 0
            if found != size:
                size, changed = found, now
            if now - changed > stall * (4 if self.dry_run else 1):
                return f"no sign of life for {now - changed:.0f} s"
            if now > end:
                return "did not end in its time"
        return ""


def kind_of(section: str) -> str:
    return "step" if section.startswith("decode") else section


def kill(process: subprocess.Popen[bytes]) -> None:
    """The process, if it still runs, and those it started: it leads a session of its own."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(device: str) -> dict[str, str]:
    """Of the processes: our packages from the checkout, nothing installed; on the host, Triton's interpreter."""
    folders = [str(ROOT / name) for name in ("server", "kernels", "adapters_store", "trainer", "tests")]
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    given["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    if device == "cpu":
        given |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    else:
        given.pop("TRITON_INTERPRET", None)
    return given


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for all of it (default 450)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks" / "kernels", help="folder of record and table"
    )
    parser.add_argument("--only", nargs="*", choices=[stage.name for stage in STAGES], help="sections; default all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes: shows that it runs, no figures")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu --dry-run shows that the benchmark itself works", file=sys.stderr)
        return 2
    if args.device == "cpu" and not args.dry_run:
        print("--device cpu goes with --dry-run: the host is no place for these figures", file=sys.stderr)
        return 2
    started = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="deltabench-") as folder:
        run = Run(Path(folder), args.device, args.dry_run, args.budget)
        for stage in STAGES:
            # Floors are made of this run's rates, so these are measured in any case.
            if args.only is None or stage.name in (*args.only, "rates"):
                run.stage(stage)
        entries = read(run.journal)
    head = {"commit": commit(), "started": started.isoformat(timespec="seconds"), "dry_run": args.dry_run}
    record = report.make_record(head, run.outcomes, entries)
    table = report.render(record)
    stem = report.file_stem(record)
    args.out.mkdir(parents=True, exist_ok=True)
    report.write(args.out / f"{stem}.json", args.out / f"{stem}.md", record, table)
    print(table)
    print(f"record: {args.out / stem}.json, table: {args.out / stem}.md")
    return report.exit_status(record)
