"""Damaged adapters of vectors: IA3, LN tuning, DoRA, trained biases, and the project's own vector format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deltaserve_store.formats.deltaserve_vectors import write_vector_adapter
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltatest.adapter_corpus import (
    CONFIG,
    FINGERPRINT,
    PREFIX,
    Q0,
    TENSORS,
    BadAdapter,
    corpus_base,
    edit_config,
    edit_tensors,
    set_value,
    write_good_lora,
)

JSON, VECTORS = "adapter.json", "adapter.safetensors"
V0 = f"{PREFIX}model.layers.0.self_attn.v_proj.ia3_l"
DOWN0 = f"{PREFIX}model.layers.0.mlp.down_proj.ia3_l"
NORM0 = "model.layers.0.input_layernorm"
NORM0_WEIGHT = f"{PREFIX}{NORM0}.ln_tuning_layers.weight"
MAGNITUDE = f"{PREFIX}{Q0}.lora_magnitude_vector"


def _around_one(*shape: int) -> torch.Tensor:
    return 1 + 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    shared = {"base_model_name_or_path": "tests/corpus-base", "task_type": "CAUSAL_LM", "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(shared | config))
    return folder


def write_good_ia3(folder: Path) -> Path:
    """A PEFT IA3: outputs of ``v_proj`` and inputs of ``down_proj``."""
    tensors = {}
    for name, linear in corpus_base().linears.items():
        if name.endswith("v_proj"):
            tensors[f"{PREFIX}{name}.ia3_l"] = _around_one(linear.out_features, 1)
        elif name.endswith("down_proj"):
            tensors[f"{PREFIX}{name}.ia3_l"] = _around_one(1, linear.in_features)
    config = {"peft_type": "IA3", "target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return _write(folder, tensors, config)


def write_good_norms(folder: Path) -> Path:
    """A PEFT LN tuning of every norm."""
    tensors = {f"{PREFIX}{name}.ln_tuning_layers.weight": _around_one(16) for name in corpus_base().norms}
    return _write(folder, tensors, {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "norm"]})


def write_good_dora(folder: Path) -> Path:
    """The good LoRA with magnitudes."""
    write_good_lora(folder)
    tensors = load_file(folder / TENSORS)
    for name, linear in corpus_base().linears.items():
        if name.endswith(("q_proj", "v_proj")):
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = 2 * _around_one(linear.out_features)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    edit_config(use_dora=True)(folder)
    return folder


def write_good_vectors(folder: Path) -> Path:
    """The project's own format: biases, scales of either side, a gain."""
    deltas = (
        VectorDelta(Q0, bias=_around_one(16), out_scale=_around_one(16)),
        VectorDelta("model.layers.1.mlp.down_proj", in_scale=_around_one(24)),
        NormDelta(NORM0, gain=_around_one(16) - 1),
    )
    write_vector_adapter(folder, deltas, FINGERPRINT, base_name="tests/corpus-base")
    return folder


VECTOR_GOOD = {
    "ia3": write_good_ia3,
    "norms": write_good_norms,
    "dora": write_good_dora,
    "vectors": write_good_vectors,
}


def _case(kind: str, name: str, spoil: Any, *reasons: tuple[str, str], is_exact: bool = True) -> BadAdapter:
    return BadAdapter(name, kind, spoil, reasons, is_exact, VECTOR_GOOD[kind])


def _vector(kind: str, name: str, code: str, where: str, value: Any) -> BadAdapter:
    """One tensor replaced (None: taken away)."""
    return _case(kind, name, edit_tensors({where: value}, VECTORS if kind == "vectors" else TENSORS), (code, where))


def _field(kind: str, field: str, value: Any, code: str, *, is_exact: bool = True) -> BadAdapter:
    file = JSON if kind == "vectors" else CONFIG
    name = f"{kind} config {field}={json.dumps(None if value is ... else value)[:40]}"
    return _case(kind, name, edit_config(file, **{field: value}), (code, f"{file}:{field}"), is_exact=is_exact)


def _modules(name: str, code: str, module: str, parts: Any, *, is_exact: bool = False) -> BadAdapter:
    modules = {Q0: ["bias", "out_scale"], "model.layers.1.mlp.down_proj": ["in_scale"], NORM0: ["gain"]}
    spoil = edit_config(JSON, modules={**modules, module: parts})
    return _case("vectors", name, spoil, (code, f"{JSON}:modules:{module}"), is_exact=is_exact)


NAN, INF = float("nan"), float("inf")
VECTOR_CORPUS: tuple[BadAdapter, ...] = (
    _vector("ia3", "IA3 scale missing", "missing_tensor", V0, None),
    _vector("ia3", "IA3 scale of another size", "shape_mismatch", V0, torch.ones(16, 1)),
    _vector("ia3", "IA3 scale on the other side", "shape_mismatch", V0, torch.ones(1, 16)),
    _vector("ia3", "IA3 input scale of another size", "shape_mismatch", DOWN0, torch.ones(1, 16)),
    _vector("ia3", "IA3 scale without its axis", "shape_mismatch", V0, torch.ones(8)),
    _vector("ia3", "NaN in IA3", "non_finite", V0, set_value(NAN)),
    _vector("ia3", "infinite input scale", "non_finite", DOWN0, set_value(INF)),
    _vector("ia3", "huge scale", "value_out_of_range", V0, set_value(1e20)),
    _vector("ia3", "integer scale", "unsupported_dtype", V0, torch.ones(8, 1, dtype=torch.int32)),
    _case(
        "ia3",
        "IA3 scale of a linear not targeted",
        edit_tensors({f"{PREFIX}{Q0}.ia3_l": torch.ones(16, 1)}),
        ("unknown_module", f"{PREFIX}{Q0}.ia3_l"),
    ),
    _field("ia3", "feedforward_modules", ..., "missing_field"),
    _field("ia3", "feedforward_modules", ".*down_proj", "invalid_value"),
    _field("ia3", "target_modules", ["lm_head", "v_proj", "down_proj"], "unsupported_target"),
    _field("ia3", "target_modules", ["c_attn"], "target_not_found", is_exact=False),
    _field("ia3", "target_modules", ".*", "regex_target"),
    _field("ia3", "modules_to_save", ["lm_head"], "unknown_module"),
    _field("ia3", "ia3_temperature", 2, "unknown_field"),
    _vector("norms", "gain missing", "missing_tensor", NORM0_WEIGHT, None),
    _vector("norms", "gain of another size", "shape_mismatch", NORM0_WEIGHT, torch.ones(24)),
    _vector("norms", "NaN in a gain", "non_finite", NORM0_WEIGHT, set_value(NAN)),
    _case(
        "norms",
        "bias of a norm that has none",
        edit_tensors({NORM0_WEIGHT.replace("weight", "bias"): torch.ones(16)}),
        ("unknown_module", NORM0_WEIGHT.replace("weight", "bias")),
    ),
    _case(
        "norms",
        "a norm of another base",
        edit_tensors({f"{PREFIX}model.layers.7.input_layernorm.ln_tuning_layers.weight": torch.ones(16)}),
        ("unknown_module", f"{PREFIX}model.layers.7.input_layernorm.ln_tuning_layers.weight"),
    ),
    _field("norms", "target_modules", ["ln_f"], "target_not_found", is_exact=False),
    _field("norms", "layers_to_transform", [0], "unknown_field"),
    _vector("dora", "magnitude missing", "missing_tensor", MAGNITUDE, None),
    _vector("dora", "magnitude of another size", "shape_mismatch", MAGNITUDE, torch.ones(8)),
    _vector("dora", "NaN in a magnitude", "non_finite", MAGNITUDE, set_value(NAN)),
    _field("dora", "lora_bias", True, "invalid_value", is_exact=False),
    _field("dora", "bias", "some", "invalid_value"),
    _field("dora", "use_dora", "yes", "invalid_value", is_exact=False),
    _field("vectors", "base_fingerprint", "cd" * 32, "base_mismatch"),
    _field("vectors", "format", "somebody-else", "unsupported_kind", is_exact=False),
    _field("vectors", "format_version", 2, "invalid_value"),
    _field("vectors", "scale", 2.0, "unknown_field"),
    _field("vectors", "modules", {}, "target_not_found", is_exact=False),
    _field("vectors", "modules", [Q0], "invalid_value", is_exact=False),
    _modules("a linear the base does not have", "unknown_module", "model.layers.9.mlp.down_proj", ["bias"]),
    _modules("the head's bias", "unsupported_target", "lm_head", ["bias"]),
    _modules("an input bias of a norm", "invalid_value", NORM0, ["in_bias"]),
    _modules("an input bias that is not there", "invalid_value", Q0, ["in_bias", "in_bias"]),
    _modules("a shift of a norm without a bias", "unsupported_feature", NORM0, ["gain", "shift"]),
    _modules("a gain of a linear", "invalid_value", Q0, ["gain"]),
    _modules("a part twice", "invalid_value", Q0, ["bias", "bias"]),
    _modules("parts that are no list", "invalid_value", Q0, 3),
    _vector("vectors", "own bias missing", "missing_tensor", f"{Q0}.bias", None),
    _vector("vectors", "own bias of another size", "shape_mismatch", f"{Q0}.bias", torch.ones(8)),
    _vector("vectors", "NaN in own scale", "non_finite", f"{Q0}.out_scale", set_value(NAN)),
    _vector("vectors", "integer gain", "unsupported_dtype", f"{NORM0}.gain", torch.ones(16, dtype=torch.int32)),
    _vector("vectors", "a vector not listed", "unexpected_tensor", f"{NORM0}.shift", torch.ones(16)),
)
