"""Floors against worked figures: Llama-3.1-8B in bf16, a copy of 4.3 TB/s, 790 TFLOP/s."""

from __future__ import annotations

import pytest

from deltabench import floors
from deltabench.floors import LLAMA_8B, FusedLinear, Rates

RATES = Rates(copy=4.3e12, gemm=790e12)
ONE_LINEAR = {"q": (4096, 4096), "k": (4096, 1024), "gate": (4096, 14336), "down": (14336, 4096)}
ROWS = [(1, 1, 16), (16, 16, 16), (64, 64, 16), (64, 64, 64), (256, 32, 16), (256, 256, 16), (4096, 8, 16)]
BASE_US = {
    "q": [7.8, 7.9, 8.1, 8.1, 10.9, 10.9, 174],
    "k": [1.95, 1.99, 2.10, 2.10, 2.72, 2.72, 43.5],
    "gate": [27.3, 27.5, 27.9, 27.9, 38.1, 38.1, 609],
    "down": [27.3, 27.5, 27.9, 27.9, 38.1, 38.1, 609],
}
LORA_US = {
    "q": [0.07, 1.07, 4.27, 16.0, 3.41, 17.1, 23.9],
    "k": [0.04, 0.66, 2.62, 9.94, 1.95, 10.5, 12.0],
    "gate": [0.15, 2.44, 9.75, 36.1, 8.29, 39.0, 63.5],
    "down": [0.15, 2.36, 9.45, 35.8, 7.07, 37.8, 44.0],
}
# (T, G, r): layer base us, LoRA MB a layer, LoRA floor us a layer, step ms, share of the step
LAYER = {
    (1, 1, 16): (101.5, 2.6, 0.66, 3.49, 0.006),
    (16, 16, 16): (102.1, 41.9, 10.6, 3.51, 0.097),
    (64, 64, 16): (103.9, 168, 42.4, 3.57, 0.38),
    (64, 64, 64): (103.9, 671, 159, 3.57, 1.43),
    (256, 32, 16): (141, 84, 32.9, 4.86, 0.22),
    (256, 256, 16): (141, 671, 169, 4.86, 1.12),
    (4096, 8, 16): (2262, 21, 219, 72.6, 0.097),
}
SPARSE_US = {(16, 16): 17.9, (64, 64): 71.5, (256, 32): 47.5, (256, 256): 286}


def close(found: float, wanted: float) -> None:
    """Equal to the digits that the worked figure has."""
    digits = len(f"{wanted:g}".split(".")[1]) if "." in f"{wanted:g}" else 0
    assert found == pytest.approx(wanted, abs=0.75 * 10**-digits), (found, wanted)


@pytest.mark.parametrize("name", ONE_LINEAR)
def test_one_linear(name: str) -> None:
    in_features, out_features = ONE_LINEAR[name]
    group = FusedLinear(name, in_features, (out_features,))
    for (rows, adapters, rank), base, lora in zip(ROWS, BASE_US[name], LORA_US[name], strict=True):
        close(floors.linear_seconds(in_features, out_features, rows, RATES) * 1e6, base)
        close(floors.lora_seconds(group, rows, [rank] * adapters, RATES) * 1e6, lora)


@pytest.mark.parametrize("point", LAYER, ids=str)
def test_layer_and_step(point: tuple[int, int, int]) -> None:
    rows, adapters, rank = point
    base, megabytes, lora, step, share = LAYER[point]
    ranks = [rank] * adapters
    layer_lora = floors.layer_lora_seconds(LLAMA_8B, rows, ranks, RATES)
    # A prefill step needs the logits of each sequence's last row alone.
    step_base = floors.step_base_seconds(LLAMA_8B, rows, RATES, head_rows=rows if rows <= 256 else adapters)
    assert floors.layer_base_seconds(LLAMA_8B, rows, RATES) * 1e6 == pytest.approx(base, rel=5e-3)
    total = sum(floors.lora_weight_bytes(group, ranks) for group in LLAMA_8B.groups)
    assert total / 1e6 == pytest.approx(megabytes, rel=2e-2)
    assert layer_lora * 1e6 == pytest.approx(lora, rel=6e-3)
    assert step_base * 1e3 == pytest.approx(step, rel=3e-3)
    assert LLAMA_8B.layers * layer_lora / step_base == pytest.approx(share, rel=2e-2)


@pytest.mark.parametrize("point", SPARSE_US, ids=str)
def test_sparse_layer(point: tuple[int, int]) -> None:
    found = floors.layer_sparse_seconds(LLAMA_8B, *point, 0.005, RATES)
    assert found * 1e6 == pytest.approx(SPARSE_US[point], rel=1e-2)


def test_ranks_count_one_by_one() -> None:
    group = LLAMA_8B.group("qkv")
    assert floors.lora_weight_bytes(group, [8, 16, 32, 64]) == floors.lora_weight_bytes(group, [30] * 4)


def test_kv_of_a_position_is_128_kilobytes() -> None:
    assert LLAMA_8B.kv_bytes_per_position == 128 * 1024
    assert floors.step_kv_seconds(LLAMA_8B, 64, 128, RATES) * 1e6 == pytest.approx(250, rel=2e-3)
