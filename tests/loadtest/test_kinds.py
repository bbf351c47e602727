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
from loadtest.paired import WARM_ROUNDS, Pair, in_pairs
from loadtest.plots_of_adapters import draw_all
from loadtest.tables import render
from loadtest.tables_of_kinds import added

SHARES = (1.01, 1.01, 1.01, 1.02, 1.03, 1.05, 1.05, 1.9)
WIDTHS = sum(sum(size) for size in TINY.projections().values())
WEIGHTS = sum(out * width for out, width in TINY.projections().values())


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return base_of(TINY, torch.bfloat16)


def test_a_run_of_every_kind_writes_what_the_page_shows(tmp_path: Path) -> None:
    words = ["--rows", "4", "--context", "5", "--rounds", "1", "--longer", "2", "--seconds", "0", "--threads", "1"]
    assert kinds.main([*words, "--out", str(tmp_path)], TINY) == 0
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in record["kinds"]] == [kind.name for kind in KINDS]
    for entry in record["kinds"]:
        assert set(entry["step_seconds"]) == {"distinct", "shared"}
        most = 2 if entry["is_vector"] else 1
        for pairs in entry["step_seconds"].values():
            assert {side: len(values) for side, values in pairs.items()} == {"reference": most, "own": most}
        assert entry["adapter_bytes"] > 0
        assert entry["read_bytes"]["distinct"] >= entry["read_bytes"]["shared"] > 0
    found = {entry["name"]: entry for entry in record["kinds"]}
    assert found["lora"]["read_bytes"]["distinct"] == 4 * TINY.layers * RANK * WIDTHS * 2
    assert found["lora"]["read_bytes"]["shared"] * 4 == found["lora"]["read_bytes"]["distinct"]
    # DoRA is held against LoRA: the scales alone are its own.
    outputs = sum(out for out, _ in TINY.projections().values())
    assert found["dora"]["read_bytes"]["distinct"] == 4 * TINY.layers * outputs * 4
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
            # The machine got slower by half; the share did not.
            "distinct": {"reference": [0.1, 0.2], "own": [0.103, 0.206]},
            "shared": {"reference": [0.1, 0.2], "own": [0.1, 0.2]},
        },
    }
    of_base = [0.05] * 4 + [0.1] * 4
    bias = {**entry, "name": "bias", "title": "BitFit", "on": ""}
    bias["step_seconds"] = {
        "distinct": {"reference": of_base, "own": [t * s for t, s in zip(of_base, SHARES, strict=True)]},
        "shared": {"reference": of_base, "own": of_base},
    }
    parameters = {"rows": 32, "context": 128, "dtype": "bfloat16", "instruction_set": "avx2", "threads": 2}
    parameters["shape"] = {"layers": 30, "hidden": 576}
    rates = {"read_bytes_per_second": 2 * 10**9, "flops_per_second": 10**11}
    machine = {"processor": "Abacus 3", "cores": 2, "memory_bytes": 8 << 30, "system": "Linux", "python": "3.11"}
    head = {"kind": "kinds", "taken_at": "2026-01-01 00:00 UTC", "seed": 0, "machine": machine, "versions": {}}
    text = render({**head, "parameters": parameters, "rates": rates, "kinds": [entry, bias]})
    # 2 MB at 2 GB/s are 1 ms; the FLOPs of 32 rows 0.32 ms, which is more than 0.1 MB take.
    assert "| DoRA | 2.50 | 3.0 % of that | 1.00 | 4.5 | 0.0 % of that | 0.32 | – |" in text
    # Of eight pairs the median lies between the least and the greatest: anything else has more than 2.5 % beside it.
    assert "| BitFit | 2.50 | 2.5 [1.0–90.0] % | 1.00 | 2.0 | 0.0 [0.0–0.0] % | 0.32 | – |" in text
    assert "The base's step takes 75.0 [50.0–100.0] ms," in text
    assert "2 to 8 pairs of vectors" in text


def test_neighbours_take_turns_in_being_first() -> None:
    calls: list[str] = []
    pairs = {
        case: Pair(lambda c=case: calls.append(f"{c} reference"), lambda c=case: calls.append(f"{c} own"))
        for case in ("distinct", "shared")
    }
    samples = in_pairs(pairs, rounds=4, seconds=0)
    one = ["distinct reference", "distinct own", "shared reference", "shared own"]
    other = ["distinct own", "distinct reference", "shared own", "shared reference"]
    # One round warms up; two are measured however long they take, and never an odd number where more are asked for.
    assert calls == one + one + other
    assert all(len(values) == 2 for found in samples.values() for values in found)
    calls.clear()
    assert {len(found.own) for found in in_pairs(pairs, rounds=4, seconds=60).values()} == {4}
    assert calls == one * (WARM_ROUNDS + 1) + other + one + other
    assert {len(found.own) for found in in_pairs(pairs, rounds=1, seconds=60).values()} == {1}


def test_a_slow_step_does_not_move_the_estimate_and_both_orders_count() -> None:
    """A clock of its own: the first step of a pair takes a tenth longer, the own one 2 %; one is interrupted."""
    now, count = [0.0], [0]

    def run(seconds: float) -> None:
        now[0] += seconds * (1.1 if count[0] % 2 == 0 else 1.0) + (5.0 if count[0] == 22 else 0.0)
        count[0] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loadtest.paired.time.perf_counter", lambda: now[0])
        samples = in_pairs({"distinct": Pair(lambda: run(1.0), lambda: run(1.02))}, rounds=40, seconds=1e9)
    entry = {"step_seconds": {"distinct": samples["distinct"]._asdict()}}
    found = added(entry, "distinct")
    assert found.interval == pytest.approx((1.02 / 1.1 - 1, 1.02 * 1.1 - 1))
    assert found.share == pytest.approx(sum(found.interval) / 2)


def test_unknown_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kinds.main(["--only", "lora,magic"])
    assert "no kind magic" in capsys.readouterr().err
