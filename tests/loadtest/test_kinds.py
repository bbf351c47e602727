"""The benchmark of kinds runs every kind through the engine's step and counts what an adapter is; never how fast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltaserve.model.base import BaseModel
from deltaserve_kernels import RotationFactor
from deltatest.fixture_of_load import TINY
from loadtest import kinds
from loadtest.kind_adapters import BLOCK, BY_NAME, KINDS, PREFIX_TOKENS, RANK, rotations
from loadtest.kind_steps import base_of
from loadtest.kind_work import work_of
from loadtest.plots_of_adapters import draw_all
from loadtest.tables import render

WIDTHS = sum(sum(size) for size in TINY.projections().values())
WEIGHTS = sum(out * width for out, width in TINY.projections().values())


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return base_of(TINY, torch.bfloat16)


def test_a_run_of_every_kind_writes_what_the_page_shows(tmp_path: Path) -> None:
    words = ["--rows", "4", "--context", "5", "--rounds", "1", "--seconds", "0", "--threads", "1"]
    assert kinds.main([*words, "--out", str(tmp_path)], TINY) == 0
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in record["kinds"]] == [kind.name for kind in KINDS]
    for entry in record["kinds"]:
        assert {len(values) for values in entry["step_seconds"].values()} == {1}
        assert entry["adapter_bytes"] > 0
        assert entry["read_bytes"]["distinct"] >= entry["read_bytes"]["shared"] > 0
    found = {entry["name"]: entry for entry in record["kinds"]}
    assert found["lora"]["read_bytes"]["distinct"] == 4 * TINY.layers * RANK * WIDTHS * 2
    assert found["lora"]["read_bytes"]["shared"] * 4 == found["lora"]["read_bytes"]["distinct"]
    # DoRA is held against LoRA: the scales alone are its own.
    outputs = sum(out for out, _ in TINY.projections().values())
    assert found["dora"]["read_bytes"]["distinct"] == 4 * TINY.layers * outputs * 4
    assert set(found["dora"]["step_seconds"]) > {"distinct reference", "shared reference"}
    text = render(record)
    assert all(f"| {kind.title} |" in text for kind in KINDS)
    assert [path.name for path in draw_all(record, tmp_path, "kinds")] == ["kinds-added_by_each_kind.png"]


def test_work_is_that_of_the_adapters_own_numbers(base: BaseModel) -> None:
    def work(name: str) -> tuple[int, int, int]:
        return tuple(work_of(BY_NAME[name].make(base), base))

    assert work("lora")[2] == TINY.layers * 2 * RANK * WIDTHS
    assert work("signs")[2] == TINY.layers * 2 * WEIGHTS
    bits, again, marked = work("bitmap")[0] - 2 * TINY.layers * WEIGHTS, *work("bitmap")[1:]
    words = sum(out * -(-width // 32) for out, width in TINY.projections().values())
    assert (bits, again) == (4 * TINY.layers * words, 0)
    assert 0.08 < marked / (TINY.layers * 2 * WEIGHTS) < 0.12
    inputs = sum(width for _, width in TINY.projections().values())
    assert work("oft") == (TINY.layers * inputs * BLOCK * 2, 0, TINY.layers * 2 * inputs * BLOCK)
    shared = rotations(base, "output", lambda _: (RotationFactor(torch.zeros(1, 8, 8, dtype=torch.bfloat16)),))
    outputs = sum(out for out, _ in TINY.projections().values())
    assert work_of(shared, base).flops == TINY.layers * 2 * outputs * 8, "one block for all columns is met by all"
    per_position = TINY.layers * TINY.kv_heads * TINY.head_dim
    assert work("prefix")[:2] == (0, PREFIX_TOKENS * per_position * 2 * 2)
    assert work("norms") == (4 * (2 * TINY.layers + 1) * TINY.hidden, 0, (2 * TINY.layers + 1) * TINY.hidden)


def test_what_is_added_is_told_by_neighbouring_steps() -> None:
    entry = {
        "name": "dora",
        "title": "DoRA",
        "on": "lora",
        "is_vector": True,
        "adapter_bytes": 2_500_000,
        "flops_of_row": 10**6,
        "read_bytes": {"distinct": 2 * 10**6, "shared": 10**5},
        "step_seconds": {
            "base": [0.05, 0.1],
            "distinct reference": [0.1, 0.2],
            "distinct": [0.103, 0.206],  # the machine got slower by half; the share did not
            "shared reference": [0.1, 0.2],
            "shared": [0.1, 0.2],
        },
    }
    parameters = {"rows": 32, "context": 128, "dtype": "bfloat16", "instruction_set": "avx2", "threads": 2}
    parameters["shape"] = {"layers": 30, "hidden": 576}
    rates = {"read_bytes_per_second": 2 * 10**9, "flops_per_second": 10**11}
    machine = {"processor": "Abacus 3", "cores": 2, "memory_bytes": 8 << 30, "system": "Linux", "python": "3.11"}
    head = {"kind": "kinds", "taken_at": "2026-01-01 00:00 UTC", "seed": 0, "machine": machine, "versions": {}}
    text = render({**head, "parameters": parameters, "rates": rates, "kinds": [entry]})
    # 2 MB at 2 GB/s are 1 ms; the FLOPs of 32 rows 0.32 ms, which is more than 0.1 MB take.
    assert "| DoRA | 2.50 | 3.0 [3.0–3.0] % of that | 1.00 | 4.5 | 0.0 [0.0–0.0] % of that | 0.32 | – |" in text
    assert "The base's step takes 75.0 [50.0–100.0] ms." in text


def test_unknown_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kinds.main(["--only", "lora,magic"])
    assert "no kind magic" in capsys.readouterr().err
