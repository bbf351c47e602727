"""The format of sums with factors of few bits, whole matrices and signs; the judge reads bits by integer arithmetic."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deltaserve_store.dense_deltas import DenseDelta, SignDelta
from deltaserve_store.formats.deltaserve_terms import write_terms_adapter
from deltaserve_store.parsed import LoraDelta
from deltatest.packed_corpus import drawn_packed, numbers_of
from deltatest.parity.registry import BASE_NAME, Bench, Entry
from deltatest.peft_adapters import base_logits


def _packed(bench: Bench, folder: Path) -> Path:
    """Of each linear in turn bands of four widths; on every second one plain directions beside them."""
    generator = torch.Generator().manual_seed(11)
    deltas: list[Any] = []
    for place, (name, linear) in enumerate(bench.spec.linears.items()):
        shape = linear.out_features, linear.in_features
        deltas.append(drawn_packed(name, shape, {8: 1, 4: 2, 3: 2, 2: 3}, 32, seed=place, size=0.3))
        if place % 2:
            a, b = (0.2 * torch.randn(2, width, generator=generator) for width in reversed(shape))
            deltas.append(LoraDelta(name, a, b.t(), 1.0))
    write_terms_adapter(folder, deltas, bench.spec.fingerprint, base_name=BASE_NAME, method="by hand")
    return folder


def _matrices(bench: Bench, folder: Path) -> Path:
    """Of each linear in turn a matrix, signs, and few bits."""
    generator = torch.Generator().manual_seed(12)
    deltas: list[Any] = []
    for place, (name, linear) in enumerate(bench.spec.linears.items()):
        shape = linear.out_features, linear.in_features
        if place % 3 == 0:
            deltas.append(DenseDelta(name, 0.05 * torch.randn(shape, generator=generator)))
        elif place % 3 == 1:
            words = torch.randint(-(1 << 31), 1 << 31, (shape[0], shape[1] // 32), generator=generator)
            deltas.append(SignDelta(name, words.int(), 0.05 * torch.rand(shape[0], generator=generator)))
        else:
            deltas.append(drawn_packed(name, shape, {3: 4}, 64, seed=place, size=0.3))
    write_terms_adapter(folder, deltas, bench.spec.fingerprint, base_name=BASE_NAME, method="by hand")
    return folder


def _changed(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    edited = copy.deepcopy(model)
    tensors = load_file(folder / "adapter.safetensors")
    for name, told in json.loads((folder / "adapter.json").read_text())["modules"].items():
        weight = edited.get_submodule(name).weight.data
        found = {
            part: tensors.get(f"{name}.{part}") for part in ("a", "b", "codes", "scales", "delta", "signs", "scale")
        }
        if "rank" in told:
            weight += found["b"] @ found["a"]
        if "packed" in told:
            ranks = {int(bits): rank for bits, rank in told["packed"]["ranks"].items()}
            a, b = numbers_of(tuple(weight.shape), ranks, told["packed"]["span"], found["codes"], found["scales"])
            weight += torch.tensor(b).t() @ torch.tensor(a)
        if told.get("matrix") == "delta":
            weight += found["delta"]
        if told.get("matrix") == "signs":
            for column in range(weight.shape[1]):
                bit = (found["signs"][:, column // 32] >> (column % 32)) & 1
                weight[:, column] += (2 * bit - 1) * found["scale"]
    return base_logits(edited, ids)


_PARTS = ("a", "b", "codes", "scales", "delta", "signs", "scale")
_OWN: dict[str, Any] = {"writer": "deltaserve", "oracle": _changed, "judge": "edited weights"}
ENTRIES = (
    Entry("deltaserve terms", "few bits", write=_packed, **_OWN),
    Entry("deltaserve terms", "matrices, signs, few bits", write=_matrices, **_OWN),
)
