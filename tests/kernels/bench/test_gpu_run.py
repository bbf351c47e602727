"""The GPU benchmark as a whole, dry, and how it treats processes that die, hang, or cannot start."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deltabench import gpu, gpu_tests
from deltabench.gpu import STAGES, Outcome, Run, Stage
from deltabench.journal import Journal, read

ROOT = Path(__file__).resolve().parents[3]
BENCH = ROOT / "kernels" / "bench.py"
RESULT_FIELDS = {"kind", "key", "status", "reason"}
KERNEL_FIELDS = {
    "point", "T", "G", "ranks", "slots", "group", "implementation", "origin", "floor_us", "base_floor_us", "base_us",
    "base_nodes", "error", "allowed", "total_us", "added_us", "over_floor", "spread_us", "rounds", "layers", "clock",
    "nodes",
}  # fmt: skip
STEP_FIELDS = {
    "point", "T", "G", "context", "error", "allowed", "graph_ms", "whole_ms", "eager_ms", "nodes", "floor_ms",
    "over_floor",
}  # fmt: skip


def bench(*arguments: str, timeout: float = 400, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, and the benchmark runs its kernels, interpreted here")
    out = tmp_path_factory.mktemp("out")
    empty = tmp_path_factory.mktemp("vendor")
    done = bench("gpu", "--device", "cpu", "--dry-run", "--out", str(out), DELTABENCH_VENDOR=str(empty))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (record,) = out.glob("*.json")
    return done, json.loads(record.read_text(encoding="utf-8")), record.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.timeout(600)
def test_a_dry_run_measures_everything_once(dry_run) -> None:
    done, record, table = dry_run
    assert record["benchmark"] == "gpu"
    assert record["dry_run"] is True
    assert [section["name"] for section in record["sections"]] == [stage.name for stage in STAGES]
    assert {section["status"] for section in record["sections"] if section["name"] != "warm"} == {"ok"}
    assert record["rates"]["copy_bytes_per_second"] > 0
    assert record["rates"]["gemm_flops_per_second"] > 0
    assert record["versions"]["torch"]
    assert record["machine"]["processor"]
    assert {goal["verdict"] for goal in record["goals"]} == {"not measured"}
    assert table in done.stdout
    assert "(dry run: no figures)" in table


@pytest.mark.timeout(600)
def test_every_result_of_a_dry_run_has_its_fields(dry_run) -> None:
    _, record, _ = dry_run
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in record["results"]:
        assert entry.keys() >= RESULT_FIELDS
        assert (entry["status"] == "ok") == (entry["reason"] == ""), entry
        assert entry["status"] in ("ok", "not present"), entry
        kinds.setdefault(entry["kind"], []).append(entry)
    assert set(kinds) == {"tests", "lora", "sparse", "step", "metadata", "repeatability"}
    for entry in [*kinds["lora"], *kinds["sparse"]]:
        if entry["status"] == "ok":
            assert entry.keys() >= KERNEL_FIELDS, entry["key"]
            assert entry["error"] <= entry["allowed"]
            assert entry["clock"] == "wall clock"
    for entry in kinds["step"]:
        assert entry.keys() >= STEP_FIELDS, entry["key"]
        assert entry["error"] <= entry["allowed"]
    ours = {entry["implementation"] for entry in kinds["lora"] if entry["origin"] == "ours" and entry["status"] == "ok"}
    assert ours == {"by row", "two launches", "one launch"}
    absent = {entry["implementation"] for entry in kinds["lora"] if entry["status"] == "not present"}
    assert absent == {"vLLM shrink + expand", "SGLang csgmv", "torch grouped_mm"}
    (repeat,) = kinds["repeatability"]
    assert repeat["alone"] is True
    assert {entry["point"] for entry in kinds["step"]} >= {"base T=4", "(4,2,8)", "(4,2,8) on q, v", "sparse (4,2,0)"}


def test_without_a_gpu_it_says_so() -> None:
    done = bench("gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_the_host_gives_no_figures() -> None:
    done = bench("gpu", "--device", "cpu")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_unknown_benchmarks_are_named() -> None:
    done = bench("disk")
    assert done.returncode == 2
    assert "disk" in done.stderr


# ---------------------------------------------------------------- processes that end badly


def fake_section(run: Run, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Sections become ``python -c script`` with the journal's path as its argument."""

    def start(name: str, seconds: float, journal: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", script, str(journal)]
        return subprocess.Popen(
            command, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
        )

    monkeypatch.setattr(run, "_start", start)


SECTION = """
import os, sys, time
sys.path.insert(0, {path!r})
from pathlib import Path
import deltabench.journal as j
journal = j.Journal(Path(sys.argv[1]))
for name in "abc":
    if journal.is_done(name):
        continue
    journal.start(name)
    if name == "b":
        {fault}
    journal.add("lora", name, "ok", {{}})
"""


def section(fault: str) -> str:
    return SECTION.format(path=str(ROOT / "kernels"), fault=fault)


def statuses(run: Run) -> dict[str, str]:
    return {entry["key"]: entry["status"] for entry in read(run.journal) if entry["kind"] != "started"}


def test_what_kills_its_process_is_skipped_by_the_next(tmp_path, monkeypatch) -> None:
    run = Run(tmp_path, "cpu", False, 60)
    fake_section(run, monkeypatch, section("os._exit(9)"))
    run.stage(Stage("lora", 60, 0))
    assert statuses(run) == {"a": "ok", "b": "failed", "c": "ok"}
    assert run.outcomes[0].status == "ok"
    (failed,) = [entry for entry in read(run.journal) if entry.get("status") == "failed"]
    assert "status 9" in failed["reason"]


def test_what_hangs_is_killed_and_skipped(tmp_path, monkeypatch) -> None:
    run = Run(tmp_path, "cpu", False, 60)
    fake_section(run, monkeypatch, section("time.sleep(1000)"))
    started = time.monotonic()
    run.stage(Stage("lora", 60, 0, stall=8.0))
    assert time.monotonic() - started < 50
    assert statuses(run) == {"a": "ok", "b": "failed", "c": "ok"}


def test_a_lost_device_starts_the_section_again(tmp_path, monkeypatch) -> None:
    run = Run(tmp_path, "cpu", False, 60)
    fake_section(run, monkeypatch, section("journal.add('lora', 'b', 'failed', {}, 'fault'); sys.exit(75)"))
    run.stage(Stage("lora", 60, 0))
    assert statuses(run) == {"a": "ok", "b": "failed", "c": "ok"}
    assert run.outcomes[0].status == "ok"


def test_a_section_that_cannot_start_is_broken(tmp_path, monkeypatch) -> None:
    run = Run(tmp_path, "cpu", False, 60)
    fake_section(run, monkeypatch, "raise SystemExit(3)")
    run.stage(Stage("lora", 60, 0))
    assert run.outcomes == [Outcome("lora", "broken", run.outcomes[0].seconds, "exit status 3")]


def test_what_the_budget_does_not_reach_is_named(tmp_path) -> None:
    run = Run(tmp_path, "cpu", False, 100)
    run.stage(Stage("lora", 120, 95))
    assert run.outcomes[0].status == "skipped"
    assert "budget" in run.outcomes[0].reason


def test_the_shares_leave_room_under_eight_minutes() -> None:
    """However long each stage takes, the next has what was kept for it, and the sum stays below the limit."""
    left = 450.0
    for stage in STAGES:
        allowed = min(stage.seconds, left - stage.kept_behind)
        assert allowed >= min(15.0, stage.seconds / 2), stage
        left -= allowed
    assert left >= 0.0


# ---------------------------------------------------------------- tests with the mark


def test_files_with_the_mark_are_found() -> None:
    found = [path.relative_to(ROOT).as_posix() for path in gpu_tests.files()]
    assert "tests/kernels/triton_ops/test_on_gpu.py" in found
    assert all("server" not in path and "api" not in path for path in found)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("==== 3 failed, 12 passed, 1 skipped in 3.20s ====", {"failed": 3, "passed": 12, "skipped": 1}),
        ("1 passed, 26 deselected in 0.89s", {"passed": 1}),
        ("2 errors in 0.10s", {"error": 2}),
        ("nothing", {}),
    ],
)
def test_counts_are_read_from_the_closing_line(line: str, expected: dict[str, int]) -> None:
    assert gpu_tests.counts_of(f"collected 20 items\n{line}\n") == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("assert True", ""),
        ("assert False", "1 failed"),
        ("pytest.skip('no card')", "no test ran"),
        ("time.sleep(600)", "did not end"),
    ],
)
def test_outcomes_of_tests(tmp_path, monkeypatch, body: str, reason: str) -> None:
    mark = "pytest.mark." + "gpu"
    source = f"import time, pytest\n@{mark}\ndef test_it():\n    {body}\ndef test_other():\n    assert False\n"
    path = tmp_path / "test_marked.py"
    path.write_text(source)
    monkeypatch.setattr(gpu_tests, "files", lambda: [path])
    seconds = 6.0 if "sleep" in body else 60.0
    result = gpu_tests.run(tmp_path, dict(os.environ), seconds, dry_run=False)
    assert result.is_good == (not reason), result
    assert reason in result.reason


def test_a_stage_of_failed_tests_is_broken_and_recorded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        gpu_tests,
        "run",
        lambda *_, **__: gpu_tests.TestResult({"failed": 2, "passed": 1}, "pytest ended with status 1"),
    )
    run = Run(tmp_path, "cpu", False, 60)
    run.stage(Stage("tests", 60, 0))
    assert run.outcomes[0].status == "broken"
    Journal(run.journal)
    (entry,) = read(run.journal)
    assert (entry["status"], entry["failed"]) == ("failed", 2)


def test_some_sections_come_with_the_rates_of_the_run(tmp_path, monkeypatch) -> None:
    ran: list[str] = []

    def note(self: Run, stage: Stage) -> None:
        ran.append(stage.name)
        self.outcomes.append(Outcome(stage.name, "ok", 0.0))

    monkeypatch.setattr(Run, "stage", note)
    assert gpu.main(["--device", "cpu", "--dry-run", "--only", "decode", "--out", str(tmp_path)]) == 0
    assert ran == ["rates", "decode"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}


def test_processes_find_our_packages_and_nothing_else_decides() -> None:
    found = gpu.environment("cuda")
    assert found["PYTHONPATH"].split(os.pathsep)[:5] == [
        str(ROOT / name) for name in ("server", "kernels", "adapters_store", "trainer", "tests")
    ]
    assert "TRITON_INTERPRET" not in found
    assert gpu.environment("cpu")["TRITON_INTERPRET"] == "1"
