"""The benchmark of a decode step on the CPU runs end to end and counts bytes as the adapters have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltabench import cpu_step, step_adapters
from deltabench.points import uniform
from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import cpu

TINY = cpu_step.SMALL | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 256,
}


@pytest.fixture
def tiny_base(tmp_path: Path) -> BaseModel:
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    return load_base(tmp_path, dtype=torch.bfloat16, load_format="dummy")


def test_adapters_are_what_was_drawn_and_lie_as_the_server_loads_them(tiny_base: BaseModel) -> None:
    point, numbers = uniform(3, 3, 2), range(len(tiny_base.linears))
    drawn_lora = step_adapters.lora_tables(tiny_base, point)
    drawn_sparse = step_adapters.sparse_tables(tiny_base, point, 0.01)
    lora, _ = cpu_step.as_served(tiny_base, drawn_lora)
    _, sparse = cpu_step.as_served(tiny_base, drawn_sparse)
    for slot in range(3):
        for drawn, served in ((drawn_lora, lora), (drawn_sparse, sparse)):
            parts = [tensor for number in numbers for tensor in served.get(number, slot)]
            expected = [tensor for number in numbers for tensor in drawn.get(number, slot)]
            assert all(map(torch.equal, parts, expected))
            assert len({tensor.untyped_storage().data_ptr() for tensor in parts}) == 1
            addresses = [tensor.data_ptr() for tensor in parts]
            assert addresses == sorted(addresses)  # in the order that a step reads them
    assert lora.has_slot(2)


@pytest.mark.skipif(not cpu.is_available(), reason="it measures the C++ operators")
def test_a_small_run_writes_its_record_and_page(tmp_path: Path) -> None:
    words = ["--rows", "3", "--rank", "2", "--context", "20", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]
    assert cpu_step.main(words, TINY) == 0
    record = json.loads((tmp_path / "cpu-step.json").read_text(encoding="utf-8"))
    in_and_out = 64 + 64 + 2 * (64 + 32) + 64 + 64 + 2 * (64 + 96) + 96 + 64  # q, k and v, o, gate and up, down
    assert record["added"]["lora"]["bytes"] == 3 * 2 * 2 * in_and_out * 2  # adapters, layers, rank, bf16
    entries = sum(round(0.005 * size) for size in (64 * 64, 64 * 32, 64 * 32, 64 * 64, 64 * 96, 64 * 96, 96 * 64))
    starts = 64 + 32 + 32 + 64 + 96 + 96 + 64 + 7
    assert record["added"]["sparse"]["bytes"] == 3 * 2 * (6 * entries + 4 * starts)
    for kind in ("lora", "sparse"):
        added = record["added"][kind]
        assert added["floor_ms"] == pytest.approx(added["bytes"] / record["read_bytes_per_second"] * 1e3)
        assert record["step_ms"][kind]["min"] > 0
    assert (tmp_path / "cpu-step.md").read_text(encoding="utf-8") == cpu_step.render(record)
