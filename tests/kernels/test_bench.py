from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deltaserve_kernels import cpu

BENCH = Path(__file__).parents[2] / "kernels" / "bench.py"


def test_quick_bench_runs_and_writes_one_record(tmp_path):
    if not cpu.is_available():
        pytest.skip(f"no C++ library: {cpu.unavailable_reason()}")
    target = tmp_path / "record.json"
    command = [sys.executable, str(BENCH), "--quick", "--threads", "1", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(target.read_text(encoding="utf-8"))
    assert record["quick"] is True
    assert record["machine"]["read_bytes_per_second"] > 0
    assert {entry["operator"] for entry in record["records"]} == {"lora", "sparse", "attention"}
    for entry in record["records"]:
        assert entry["max_error"] <= entry["tolerance"]
        for name in ("cpu", "reference", "common"):
            timing = entry[name]
            assert 0 < timing["min_us"] <= timing["median_us"] <= timing["max_us"]
    assert len(done.stdout.splitlines()) == 2 + len(record["records"])
