"""Damaged adapters of residual modules and of whole-weight differences, in the project's own formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from deltaserve_kernels import pack_bits
from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.dense_deltas import DenseDelta, MaskDelta, SignDelta
from deltaserve_store.formats.deltaserve_bottleneck import write_bottleneck_adapter
from deltaserve_store.formats.deltaserve_dense import write_dense_adapter
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltatest.adapter_corpus import FINGERPRINT, Q0, BadAdapter, edit_config, edit_tensors, set_value

JSON, TENSORS = "adapter.json", "adapter.safetensors"
OUT0, IN1 = "layers.0.attn_out", "layers.1.mlp_in"
V0, DOWN1 = "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"
NORM0 = "model.layers.0.input_layernorm"


def _randn(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def write_good_bottleneck(folder: Path) -> Path:
    """One module of each placement; rank 4 over 16."""
    deltas = (
        BottleneckDelta(OUT0, _randn(4, 16), _randn(16, 4), "gelu", _randn(4), _randn(16), True, 2.0),
        BottleneckDelta(IN1, _randn(4, 16), _randn(16, 4), "relu"),
        BottleneckDelta("final_hidden", _randn(3, 16), _randn(16, 3), "tanh", None, _randn(16)),
    )
    write_bottleneck_adapter(folder, deltas, FINGERPRINT, base_name="tests/corpus-base")
    return folder


def write_good_dense(folder: Path) -> Path:
    """Each form once, a bias, a gain."""
    deltas = (
        DenseDelta(Q0, _randn(16, 16)),
        VectorDelta(Q0, bias=_randn(16)),
        MaskDelta(V0, pack_bits(_randn(8, 16) > 0.3)),
        SignDelta(DOWN1, pack_bits(_randn(16, 24) > 0), torch.full((16,), 0.1)),
        NormDelta(NORM0, gain=_randn(16)),
    )
    write_dense_adapter(folder, deltas, FINGERPRINT, base_name="tests/corpus-base")
    return folder


APART_GOOD = {"bottleneck": write_good_bottleneck, "dense": write_good_dense}


def _case(kind: str, name: str, spoil: Any, *reasons: tuple[str, str], is_exact: bool = True) -> BadAdapter:
    return BadAdapter(name, kind, spoil, reasons, is_exact, APART_GOOD[kind])


def _tensor(kind: str, name: str, code: str, where: str, value: Any) -> BadAdapter:
    """One tensor replaced (None: taken away)."""
    return _case(kind, name, edit_tensors({where: value}, TENSORS), (code, where))


def _field(kind: str, field: str, value: Any, code: str, *, is_exact: bool = True) -> BadAdapter:
    name = f"{kind} config {field}={json.dumps(None if value is ... else value)[:40]}"
    return _case(kind, name, edit_config(JSON, **{field: value}), (code, f"{JSON}:{field}"), is_exact=is_exact)


def _edit_modules(change: Any) -> Any:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / JSON).read_text())
        change(config["modules"])
        (folder / JSON).write_text(json.dumps(config))

    return spoil


def _module(name: str, code: str, field: str, value: Any, point: str = OUT0) -> BadAdapter:
    """One field of one residual module changed; ``...`` removes it. Its tensors then have no place either."""

    def change(modules: dict[str, Any]) -> None:
        if value is ...:
            modules[point].pop(field)
        else:
            modules[point][field] = value

    return _case("bottleneck", name, _edit_modules(change), (code, f"{JSON}:modules:{point}:{field}"), is_exact=False)


def _listed(kind: str, name: str, code: str, module: str, entry: Any) -> BadAdapter:
    spoil = _edit_modules(lambda modules: modules.update({module.partition(":")[0]: entry}))
    return _case(kind, name, spoil, (code, f"{JSON}:modules:{module}"), is_exact=False)


NAN, INF = float("nan"), float("inf")
GOOD_MODULE = {"rank": 4, "activation": "relu", "placement": "sequential"}
_INT32 = torch.zeros(8, 1, dtype=torch.int32)
APART_CORPUS: tuple[BadAdapter, ...] = (
    _tensor("bottleneck", "down missing", "missing_tensor", f"{OUT0}.down", None),
    _tensor("bottleneck", "up missing", "missing_tensor", f"{IN1}.up", None),
    _tensor("bottleneck", "a listed bias missing", "missing_tensor", f"{OUT0}.down_bias", None),
    _tensor("bottleneck", "up stored transposed", "shape_mismatch", f"{OUT0}.up", torch.zeros(4, 16)),
    _tensor("bottleneck", "down of another rank", "shape_mismatch", f"{OUT0}.down", torch.zeros(5, 16)),
    _tensor("bottleneck", "down of another width", "shape_mismatch", f"{OUT0}.down", torch.zeros(4, 24)),
    _tensor("bottleneck", "bias of another size", "shape_mismatch", f"{OUT0}.up_bias", torch.zeros(4)),
    _tensor("bottleneck", "NaN in a module", "non_finite", f"{IN1}.down", set_value(NAN)),
    _tensor("bottleneck", "an infinite bias", "non_finite", f"{OUT0}.down_bias", set_value(INF)),
    _tensor("bottleneck", "a huge up", "value_out_of_range", f"{OUT0}.up", set_value(1e20)),
    _tensor("bottleneck", "an integer up", "unsupported_dtype", f"{OUT0}.up", torch.zeros(16, 4, dtype=torch.int32)),
    _tensor("bottleneck", "a bias not listed", "unexpected_tensor", f"{IN1}.up_bias", torch.zeros(16)),
    _tensor("bottleneck", "a norm inside a module", "unexpected_tensor", f"{OUT0}.layer_norm", torch.zeros(16)),
    _field("bottleneck", "base_fingerprint", "cd" * 32, "base_mismatch"),
    _field("bottleneck", "format_version", 2, "invalid_value"),
    _field("bottleneck", "reduction_factor", 16, "unknown_field"),
    _field("bottleneck", "modules", {}, "target_not_found", is_exact=False),
    _field("bottleneck", "modules", [OUT0], "invalid_value", is_exact=False),
    _module("an unknown activation", "unsupported_feature", "activation", "swish_of_mine"),
    _module("an activation that is no word", "unsupported_feature", "activation", ["relu"]),
    _module("no activation", "missing_field", "activation", ...),
    _module("no placement", "missing_field", "placement", ...),
    _module("no rank", "missing_field", "rank", ...),
    _module("rank 0", "rank_out_of_range", "rank", 0),
    _module("a rank above all", "rank_out_of_range", "rank", 1 << 40),
    _module("a rank that is true", "invalid_value", "rank", True),
    _module("parallel at an input", "unsupported_feature", "placement", "parallel", IN1),
    _module("parallel before the head", "unsupported_feature", "placement", "parallel", "final_hidden"),
    _listed(
        "bottleneck",
        "parallel behind the embeddings",
        "unsupported_feature",
        "embed_out:placement",
        GOOD_MODULE | {"placement": "parallel"},
    ),
    _module("a placement of no meaning", "invalid_value", "placement", "beside"),
    _module("scale 0", "invalid_value", "scale", 0),
    _module("a scale beyond reason", "invalid_value", "scale", 10**400),
    _module("a scale in words", "invalid_value", "scale", "learned"),
    _module("a bias of no module", "invalid_value", "biases", ["bias"]),
    _module("a bias twice", "invalid_value", "biases", ["up_bias", "up_bias"]),
    _module("a dropout", "unknown_field", "dropout", 0.1),
    _listed("bottleneck", "a layer the base does not have", "unknown_module", "layers.2.attn_out", GOOD_MODULE),
    _listed("bottleneck", "a point the base does not have", "unknown_module", "layers.0.embed_out", GOOD_MODULE),
    _listed("bottleneck", "a linear as a point", "unknown_module", Q0, GOOD_MODULE),
    _listed("bottleneck", "a module that is no object", "invalid_value", "layers.0.mlp_out", ["relu"]),
    _tensor("dense", "delta missing", "missing_tensor", f"{Q0}.delta", None),
    _tensor("dense", "delta of another shape", "shape_mismatch", f"{Q0}.delta", torch.zeros(8, 16)),
    _tensor("dense", "NaN in a delta", "non_finite", f"{Q0}.delta", set_value(NAN)),
    _tensor("dense", "a huge delta", "value_out_of_range", f"{Q0}.delta", set_value(1e20)),
    _tensor("dense", "an integer delta", "unsupported_dtype", f"{Q0}.delta", torch.zeros(16, 16, dtype=torch.int32)),
    _tensor("dense", "a mask of floats", "unsupported_dtype", f"{V0}.mask", torch.zeros(8, 1)),
    _tensor("dense", "a mask of int64", "unsupported_dtype", f"{V0}.mask", _INT32.long()),
    _tensor(
        "dense", "a mask that is not packed", "shape_mismatch", f"{V0}.mask", torch.zeros(8, 16, dtype=torch.int32)
    ),
    _tensor("dense", "a mask past the last column", "index_out_of_range", f"{V0}.mask", _INT32 + (1 << 16)),
    _tensor("dense", "a mask past it by the sign", "index_out_of_range", f"{V0}.mask", _INT32 - (1 << 31)),
    _tensor("dense", "signs missing", "missing_tensor", f"{DOWN1}.signs", None),
    _tensor("dense", "a scale missing", "missing_tensor", f"{DOWN1}.scale", None),
    _tensor("dense", "scales of another size", "shape_mismatch", f"{DOWN1}.scale", torch.ones(24)),
    _tensor("dense", "an infinite scale", "non_finite", f"{DOWN1}.scale", set_value(INF)),
    _tensor("dense", "a tensor not listed", "unexpected_tensor", f"{V0}.delta", torch.zeros(8, 16)),
    _tensor("dense", "a trained head", "unexpected_tensor", "lm_head.delta", torch.zeros(100, 16)),
    _field("dense", "base_fingerprint", "cd" * 32, "base_mismatch"),
    _field("dense", "bits", 1, "unknown_field"),
    _field("dense", "modules", {}, "target_not_found", is_exact=False),
    _field("dense", "modules", "all-linear", "invalid_value", is_exact=False),
    _listed("dense", "two forms of one linear", "invalid_value", Q0, ["delta", "mask"]),
    _listed("dense", "signs without a scale", "invalid_value", DOWN1, ["signs"]),
    _listed("dense", "no parts", "invalid_value", Q0, []),
    _listed("dense", "a delta of a norm", "invalid_value", NORM0, ["delta"]),
    _listed("dense", "a shift of a norm that has none", "unsupported_feature", NORM0, ["gain", "shift"]),
    _listed("dense", "a listed head", "unsupported_target", "lm_head", ["delta"]),
    _listed("dense", "a linear of another base", "unknown_module", "model.layers.9.mlp.down_proj", ["delta"]),
)
