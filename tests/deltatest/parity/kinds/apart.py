"""Whole-weight differences and residual modules, in the project's own formats."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.dense_deltas import DenseDelta, MaskDelta, SignDelta
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltatest.apart_adapters import changed_model, hooked_logits, make_bottleneck, make_dense
from deltatest.parity.registry import Bench, Entry
from deltatest.peft_adapters import base_logits


def _dense(bench: Bench, folder: Path, *, form: str) -> Path:
    return make_dense(bench.spec, folder, form, seed=len(form))


def _changed(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    tensors = load_file(folder / "adapter.safetensors")
    deltas: list[Any] = []
    for name, parts in json.loads((folder / "adapter.json").read_text())["modules"].items():
        given = {part: tensors[f"{name}.{part}"] for part in parts}
        if "gain" in given or "shift" in given:
            deltas.append(NormDelta(name, given.get("gain"), given.get("shift")))
        elif "delta" in given:
            deltas.append(DenseDelta(name, given["delta"]))
        elif "mask" in given:
            deltas.append(MaskDelta(name, given["mask"]))
        elif "signs" in given:
            deltas.append(SignDelta(name, given["signs"], given["scale"]))
        if "bias" in given:
            deltas.append(VectorDelta(name, bias=given["bias"]))
    plain: Any = SimpleNamespace(linears=defaultdict(lambda: SimpleNamespace(transposed=False)))
    return base_logits(changed_model(model, deltas, plain), ids)


def _bottleneck(bench: Bench, folder: Path, *, parallel: bool) -> Path:
    return make_bottleneck(bench.spec, folder, parallel=parallel, seed=int(parallel))


def _hooked(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    tensors = load_file(folder / "adapter.safetensors")
    deltas = []
    for point, told in json.loads((folder / "adapter.json").read_text())["modules"].items():
        matrices = tensors[f"{point}.down"], tensors[f"{point}.up"]
        biases = tensors.get(f"{point}.down_bias"), tensors.get(f"{point}.up_bias")
        is_parallel, scale = told["placement"] == "parallel", told.get("scale", 1.0)
        deltas.append(BottleneckDelta(point, *matrices, told["activation"], *biases, is_parallel, scale))
    return hooked_logits(model, "llama", deltas, ids)


_EDITED: dict[str, Any] = {"writer": "deltaserve", "oracle": _changed, "judge": "edited weights"}
_HOOKED: dict[str, Any] = {"writer": "deltaserve", "oracle": _hooked, "judge": "hooked modules"}
ENTRIES = (
    *(
        Entry("deltaserve dense", form.replace("-", " "), write=partial(_dense, form=form), **_EDITED)
        for form in ("delta", "mask", "thick-mask", "signs")
    ),
    Entry("deltaserve bottleneck", "sequential", write=partial(_bottleneck, parallel=False), **_HOOKED),
    Entry("deltaserve bottleneck", "parallel", write=partial(_bottleneck, parallel=True), **_HOOKED),
)
