"""What HTTP, tokenising and streaming cost: the same requests to the engine in process and over HTTP.

    python -m loadtest.http_cost --model FOLDER --concurrency 64 --rounds 3 --out cost.json

Both sides run in processes of their own that live for the whole run, and take turns, in an order drawn for each round;
the one that waits computes nothing. Every stream sends its next request when it has its answer. Over HTTP the client
shares the machine's cores with the server: what it takes is part of the difference, and its CPU time is in the record
beside that of the server's event loop. ``cost`` of a round is the share of the offline throughput that HTTP lost.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from loadtest.lean_client import Plan, run_closed_loop

MODEL = "base"
SIDES = ("offline", "http")
PACKAGES = ("deltaserve", "torch", "transformers", "tokenizers", "uvicorn", "starlette", "fastapi")


@dataclass(frozen=True, slots=True)
class Settings:
    """``threads`` is OMP_NUM_THREADS of both sides. ``model`` None: the embedded base."""

    model: str | None
    concurrency: int
    requests_per_stream: int
    prompt_tokens: int
    max_tokens: int
    rounds: int
    threads: int
    seed: int


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.http_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; default: the embedded base")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests-per-stream", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; default: standard output alone")
    return parser


def plan_of(settings: Settings, vocab_size: int, seed: int) -> Plan:
    """One list of prompts (token ids) per stream; none alike, so that no round meets an earlier one's prefix cache."""
    drawn = random.Random(f"{settings.seed} {seed}")
    return [
        [
            [drawn.randrange(vocab_size) for _ in range(settings.prompt_tokens)]
            for _ in range(settings.requests_per_stream)
        ]
        for _ in range(settings.concurrency)
    ]


class Offline:
    """The engine in a process of its own (``offline_worker.py``), fed token ids by lines of JSON."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.vocab_size: int = self._read()["vocab_size"]

    def run(self, plan: Plan, max_tokens: int) -> dict[str, Any]:
        opened(self._process.stdin).write(json.dumps({"plan": plan, "max_tokens": max_tokens}) + "\n")
        opened(self._process.stdin).flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = opened(self._process.stdout).readline()
        if not line:
            raise RuntimeError("the offline engine has died; its words are above")
        return json.loads(line)


class OverHttp:
    """``deltaserve serve``, as a user starts it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._pid = process.pid
        found = re.search(r" on http://127\.0\.0\.1:(\d+)", opened(process.stdout).readline())
        if found is None:
            raise RuntimeError("the server did not start; its words are above")
        self.port = int(found[1])

    def run(self, plan: Plan, max_tokens: int) -> dict[str, Any]:
        loop_before, all_before = cpu_seconds(self._pid, self._pid), cpu_seconds(self._pid)
        result = asdict(run_closed_loop(self.port, MODEL, plan, max_tokens))
        # The event loop runs on the main thread, whose id is the process's.
        result["event_loop_cpu_seconds"] = cpu_seconds(self._pid, self._pid) - loop_before
        result["server_cpu_seconds"] = cpu_seconds(self._pid) - all_before
        return result


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
def child(words: Sequence[str], threads: int) -> Iterator[subprocess.Popen[str]]:
    """A process whose pipes are text; it is ended, however this ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
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


def measure(settings: Settings) -> dict[str, Any]:
    """The record of one run. Raises ``RuntimeError`` when a side fails or the two did not generate as many tokens."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = [] if settings.model is None else ["--model", settings.model]
        seats = ["--max-num-seqs", str(settings.concurrency)]
        worker = ["-m", "loadtest.offline_worker", *model, *seats, "--store", f"{folder}/offline"]
        serve = ["-c", "from deltaserve.cli import main; main()", "serve", "--port", "0", "--no-demo-adapters"]
        names = ["--served-model-name", MODEL, "--store", f"{folder}/http"]
        offline = Offline(stack.enter_context(child(worker, settings.threads)))
        http = OverHttp(stack.enter_context(child([*serve, *model, *seats, *names], settings.threads)))
        sides: dict[str, Offline | OverHttp] = {"offline": offline, "http": http}
        for side in sides.values():
            side.run(plan_of(settings, offline.vocab_size, -1), min(8, settings.max_tokens))
        rounds = []
        for number in range(settings.rounds):
            order = list(SIDES)
            random.Random(f"order {settings.seed} {number}").shuffle(order)
            plan = plan_of(settings, offline.vocab_size, number)
            results = {name: sides[name].run(plan, settings.max_tokens) for name in order}
            rounds.append(compare(number, order, results))
            print(_line(rounds[-1]), file=sys.stderr, flush=True)
    return {
        "kind": "http_cost",
        "taken_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "parameters": asdict(settings),
        "machine": machine(),
        "versions": versions(),
        "rounds": rounds,
        "median_cost": statistics.median(each["cost"] for each in rounds),
    }


def compare(number: int, order: Sequence[str], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One round: the results of both sides and what HTTP cost. Raises ``RuntimeError`` where they did other work."""
    offline, http = results["offline"], results["http"]
    tokens = http["tokens"]
    if offline["tokens"] != tokens:
        raise RuntimeError(f"offline generated {offline['tokens']} tokens and HTTP {tokens}; they cannot be compared")
    per_second = {name: results[name]["tokens"] / results[name]["seconds"] for name in SIDES}
    microseconds = {
        f"{name}_us_per_token": 1e6 * http[f"{name}_cpu_seconds"] / tokens
        for name in ("event_loop", "server", "client")
    }
    cost = 1 - per_second["http"] / per_second["offline"]
    return {
        "round": number,
        "order": list(order),
        "results": results,
        "tokens_per_second": per_second,
        "cost": cost,
        **microseconds,
    }


def _line(made: dict[str, Any]) -> str:
    offline, http = (made["tokens_per_second"][name] for name in SIDES)
    return (
        f"round {made['round']}: offline {offline:.0f} tokens/s, HTTP {http:.0f}, cost {100 * made['cost']:.1f} %; "
        f"event loop {made['event_loop_us_per_token']:.0f} us/token, client {made['client_us_per_token']:.0f}"
    )


def machine() -> dict[str, Any]:
    """No names of hosts or users."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return {
        "processor": found[1] if found else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    given = vars(parser.parse_args(argv))
    out: Path | None = given.pop("out")
    settings = Settings(**given)
    for name in ("concurrency", "requests_per_stream", "prompt_tokens", "max_tokens", "rounds", "threads"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least 1")
    try:
        record = json.dumps(measure(settings), indent=1)
    except RuntimeError as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return 2
    print(record)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(record + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
