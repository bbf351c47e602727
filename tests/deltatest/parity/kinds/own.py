"""The project's own formats. No other program reads them, so the judge is the model with its weights edited by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deltatest.parity.registry import Bench, Entry
from deltatest.peft_adapters import base_logits, make_bitfit, make_gates, make_sparse


def edited_logits(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    """From the tensors of the file by their names, as docs/adapter-format.md says what they mean."""
    edited = copy.deepcopy(model)
    tensors = load_file(folder / "adapter.safetensors")
    modules = {name.rpartition(".")[0] for name in tensors}
    with torch.no_grad():
        for name in modules:
            _edit(edited.get_submodule(name), {key: tensors.get(f"{name}.{key}") for key in _PARTS})
    return base_logits(edited, ids)


_PARTS = ("rows", "cols", "values", "bias", "in_scale", "out_scale", "gain", "shift")


def _edit(module: Any, part: dict[str, Tensor | None]) -> None:
    if part["values"] is not None:
        module.weight[part["rows"].long(), part["cols"].long()] += part["values"]  # type: ignore[union-attr]
    if part["in_scale"] is not None:
        module.weight *= part["in_scale"]
    if part["out_scale"] is not None:
        module.weight *= part["out_scale"][:, None]
    if part["bias"] is not None:
        module.bias = nn.Parameter(part["bias"] if module.bias is None else module.bias + part["bias"])
    if part["gain"] is not None:
        module.weight += part["gain"]
    if part["shift"] is not None:
        module.bias += part["shift"]


def _sparse(bench: Bench, folder: Path) -> Path:
    return make_sparse(bench.spec, folder, base_name="tests/tiny-base")


def _bitfit(bench: Bench, folder: Path) -> Path:
    return make_bitfit(bench.spec, folder)


def _gates(bench: Bench, folder: Path) -> Path:
    return make_gates(bench.spec, folder)


_OWN: dict[str, Any] = {"writer": "deltaserve", "oracle": edited_logits, "judge": "edited weights"}
ENTRIES = (
    Entry("deltaserve sparse", "", write=_sparse, **_OWN),
    Entry("deltaserve vectors", "biases", write=_bitfit, **_OWN),
    Entry("deltaserve vectors", "scales and norms", write=_gates, **_OWN),
)
