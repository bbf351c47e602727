"""The project's own formats. No other program reads them, so the judge is the model with its weights edited by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deltaserve_store.formats.deltaserve_terms import write_terms_adapter
from deltaserve_store.formats.deltaserve_vectors import write_vector_adapter
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltatest.parity.registry import BASE_NAME, Bench, Entry
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


_PARTS = ("rows", "cols", "values", "a", "b", "bias", "in_scale", "out_scale", "gain", "shift")


def _edit(module: Any, part: dict[str, Tensor | None]) -> None:
    if part["in_scale"] is not None:
        module.weight *= part["in_scale"]
    if part["out_scale"] is not None:
        module.weight *= part["out_scale"][:, None]
    rows, cols, values = part["rows"], part["cols"], part["values"]
    if rows is not None and cols is not None and values is not None:
        module.weight[rows.long(), cols.long()] += values
    if part["a"] is not None and part["b"] is not None:
        module.weight += part["b"] @ part["a"]
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


def _scales(bench: Bench, folder: Path) -> Path:
    return make_gates(bench.spec, folder)


def _gates(bench: Bench, folder: Path) -> Path:
    """0 or 1 on both sides of every linear: what is kept in 16 bits."""
    generator = torch.Generator().manual_seed(5)

    def drawn(size: int) -> Tensor:
        return (torch.rand(size, generator=generator) < 0.9).float()

    deltas = [
        VectorDelta(name, out_scale=drawn(linear.out_features), in_scale=drawn(linear.in_features))
        for name, linear in bench.spec.linears.items()
    ]
    write_vector_adapter(folder, deltas, bench.spec.fingerprint, method="finegates")
    return folder


def _terms(bench: Bench, folder: Path) -> Path:
    """Of each linear in turn low rank, entries and a scale of outputs, all on one; and gains of norms."""
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    deltas: list[Any] = []
    for name, linear in bench.spec.linears.items():
        rows = torch.randperm(linear.out_features, generator=generator)[:5].sort().values.int()
        deltas += [
            LoraDelta(name, drawn(3, linear.in_features), drawn(linear.out_features, 3), 2.0),
            SparseDelta(name, rows, rows % linear.in_features, drawn(5)),
            VectorDelta(name, bias=drawn(linear.out_features), out_scale=1 + drawn(linear.out_features)),
        ]
    deltas += [NormDelta(name, gain=drawn(norm.size)) for name, norm in bench.spec.norms.items()]
    write_terms_adapter(folder, deltas, bench.spec.fingerprint, base_name=BASE_NAME, method="by hand")
    return folder


_OWN: dict[str, Any] = {"writer": "deltaserve", "oracle": edited_logits, "judge": "edited weights"}
ENTRIES = (
    Entry("deltaserve sparse", "", write=_sparse, **_OWN),
    Entry("deltaserve vectors", "biases", write=_bitfit, **_OWN),
    Entry("deltaserve vectors", "scales and norms", write=_scales, **_OWN),
    Entry("deltaserve vectors", "gates of both sides", write=_gates, **_OWN),
    Entry("deltaserve terms", "", write=_terms, **_OWN),
)
