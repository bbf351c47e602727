"""Damaged adapters of embedding and head: trained rows, LoRA, whole matrices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deltaserve_store.spec import BaseSpec, LinearSpec
from deltatest.adapter_corpus import (
    CONFIG,
    PREFIX,
    TENSORS,
    BadAdapter,
    corpus_base,
    edit_config,
    edit_tensors,
    set_value,
    write_good_lora,
)

E, H = "model.embed_tokens", "lm_head"
ROWS, HEAD_ROWS = (f"{PREFIX}{module}.token_adapter.trainable_tokens_delta" for module in (E, H))
ALONE, ALONE_HEAD = (f"{PREFIX}{module}.trainable_tokens_delta" for module in (E, H))
A, B = f"{PREFIX}{E}.lora_embedding_A", f"{PREFIX}{E}.lora_embedding_B"
HEAD_A, HEAD_B = f"{PREFIX}{H}.lora_A.weight", f"{PREFIX}{H}.lora_B.weight"
EMBEDDING, HEAD = f"{PREFIX}{E}.weight", f"{PREFIX}{H}.weight"
COPY = f"{PREFIX}{E}.base_layer.weight"
IDS = [41, 7, 89]


MAGNITUDE, HEAD_MAGNITUDE = (f"{PREFIX}{module}.lora_magnitude_vector" for module in (E, H))
HEAD_BIAS, HEAD_BIAS_OF_B = f"{PREFIX}{H}.base_layer.bias", f"{PREFIX}{H}.lora_B.bias"
DOWN = tuple(f"{PREFIX}model.layers.{layer}.mlp.down_proj" for layer in range(2))
NORM = f"{PREFIX}model.norm.weight"


def vocabulary_base(*, is_tied: bool = True) -> BaseSpec:
    """The corpus's base with an embedding and a head, by default tied. The head and ``down_proj`` have biases."""
    plain = corpus_base()
    return replace(
        plain,
        embedding=LinearSpec(E, 16, 100),
        head=LinearSpec(H, 100, 16, True),
        tied_embeddings=is_tied,
        linears={name: replace(x, has_bias="down_proj" in name) for name, x in plain.linears.items()},
    )


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _lora_with(tensors: dict[str, torch.Tensor], **config: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        write_good_lora(folder)
        save_file(load_file(folder / TENSORS) | tensors, folder / TENSORS, metadata={"format": "pt"})
        edit_config(**config)(folder)
        return folder

    return write


def _write_alone(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({ALONE: _randn(3, 16), ALONE_HEAD: _randn(3, 16)}, folder / TENSORS, metadata={"format": "pt"})
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "token_indices": IDS,
        "target_modules": E,
        "base_model_name_or_path": "tests/corpus-base",
        "task_type": "CAUSAL_LM",
        "init_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


_LOW_RANK = {A: _randn(4, 100), B: _randn(16, 4), HEAD_A: _randn(4, 16), HEAD_B: _randn(100, 4), COPY: _randn(100, 16)}
_WITH_MATRICES = ["q_proj", "v_proj", "embed_tokens", "lm_head"]
_MAGNITUDES = {
    f"{PREFIX}model.layers.{layer}.self_attn.{name}.lora_magnitude_vector": _randn(size)
    for layer in range(2)
    for name, size in (("q_proj", 16), ("v_proj", 8))
}
_WHOLE = {f"{name}.{part}": _randn(*size) for name in DOWN for part, size in (("weight", (16, 24)), ("bias", (16,)))}


def _write_beside(folder: Path) -> Path:
    """An IA3 with all that may stand beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    scales = {f"{PREFIX}model.layers.{layer}.self_attn.v_proj.ia3_l": _randn(8, 1) for layer in range(2)}
    saved = {EMBEDDING: _randn(100, 16), NORM: _randn(16), **_WHOLE}
    save_file({**scales, **saved}, folder / TENSORS, metadata={"format": "pt"})
    config = {
        "peft_type": "IA3",
        "target_modules": ["v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        "modules_to_save": ["embed_tokens", "mlp", "model.norm"],
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def _write_with_biases(folder: Path) -> Path:
    """A VeRA with trained biases."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"base_model.vera_A": _randn(4, 24), "base_model.vera_B": _randn(16, 4)}
    for name in DOWN:
        tensors |= {f"{name}.vera_lambda_b": _randn(16), f"{name}.vera_lambda_d": _randn(4)}
        tensors[f"{name}.base_layer.bias"] = _randn(16)
    tensors[f"{PREFIX}{H}.bias"] = _randn(100)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    config = {"peft_type": "VERA", "r": 4, "target_modules": ["down_proj"], "bias": "all"}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


AGAIN, ORIGINAL = (
    f"{PREFIX}model.layers.1.mlp.{part}.down_proj.bias" for part in ("modules_to_save.default", "original_module")
)
HEAD_AGAIN, HEAD_ORIGINAL = f"{PREFIX}{H}.modules_to_save.bias", f"{PREFIX}{H}.original_module.bias"
BIASES_AGAIN = (AGAIN, ORIGINAL, HEAD_AGAIN, HEAD_ORIGINAL)
_AGAIN = {
    **_WHOLE,
    HEAD: _randn(100, 16),
    f"{PREFIX}{H}.bias": _randn(100),
    AGAIN: _randn(16),
    ORIGINAL: _randn(16) + 1,
    HEAD_AGAIN: _randn(100),
    HEAD_ORIGINAL: _randn(100) + 1,
}
"""Of the other layer nothing is there again, as nothing needs to be."""

VOCABULARY_GOOD: dict[str, Callable[[Path], Path]] = {
    "rows": _lora_with({ROWS: _randn(3, 16)}, trainable_token_indices=IDS),
    "apart": _lora_with(
        {ROWS: _randn(3, 16), HEAD_ROWS: _randn(1, 16)}, trainable_token_indices={"embed_tokens": IDS, "lm_head": [5]}
    ),
    "alone": _write_alone,
    "low-rank": _lora_with(_LOW_RANK, target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"]),
    "saved": _lora_with(
        {EMBEDDING: _randn(100, 16), HEAD: _randn(100, 16), f"{PREFIX}{H}.bias": _randn(100), NORM: _randn(16)},
        modules_to_save=["embed_tokens", "lm_head", "model.norm"],
    ),
    "dora": _lora_with(
        {**_LOW_RANK, **_MAGNITUDES, MAGNITUDE: _randn(16), HEAD_MAGNITUDE: _randn(100), HEAD_BIAS: _randn(100)},
        target_modules=_WITH_MATRICES,
        use_dora=True,
        bias="lora_only",
    ),
    "whole": _lora_with(_WHOLE, modules_to_save=["down_proj"]),
    "again": _lora_with(_AGAIN, modules_to_save=["mlp", "lm_head"], bias="all"),
    "beside": _write_beside,
    "biases": _write_with_biases,
}


def _case(kind: str, name: str, spoil: Any, *reasons: tuple[str, str], is_exact: bool = True) -> BadAdapter:
    return BadAdapter(name, kind, spoil, reasons, is_exact, VOCABULARY_GOOD[kind])


def _tensor(kind: str, name: str, code: str, where: str, value: Any) -> BadAdapter:
    """One tensor replaced (None: taken away)."""
    return _case(kind, name, edit_tensors({where: value}), (code, where))


def _field(kind: str, field: str, value: Any, code: str, *, is_exact: bool = True) -> BadAdapter:
    name = f"{kind} config {field}={json.dumps(None if value is ... else value)[:40]}"
    return _case(kind, name, edit_config(**{field: value}), (code, f"{CONFIG}:{field}"), is_exact=is_exact)


NAN, INF = float("nan"), float("inf")
VOCABULARY_CORPUS: tuple[BadAdapter, ...] = (
    _tensor("rows", "rows missing", "missing_tensor", ROWS, None),
    _tensor("rows", "a row too few", "shape_mismatch", ROWS, torch.ones(2, 16)),
    _tensor("rows", "rows of another width", "shape_mismatch", ROWS, torch.ones(3, 8)),
    _tensor("rows", "rows without a width", "shape_mismatch", ROWS, torch.ones(48)),
    _tensor("rows", "NaN in a row", "non_finite", ROWS, set_value(NAN)),
    _tensor("rows", "a huge row", "value_out_of_range", ROWS, set_value(1e20)),
    _tensor("rows", "integer rows", "unsupported_dtype", ROWS, torch.ones(3, 16, dtype=torch.int32)),
    _tensor(
        "rows", "other rows for the head that takes the embedding's", "shape_mismatch", HEAD_ROWS, torch.ones(3, 16)
    ),
    _tensor("rows", "a vocabulary that has grown", "added_tokens", EMBEDDING, torch.ones(101, 16)),
    _tensor("rows", "a vocabulary that has shrunk", "shape_mismatch", EMBEDDING, torch.ones(90, 16)),
    _field("rows", "trainable_token_indices", [41, 7, 90], "index_out_of_range"),
    _field("rows", "trainable_token_indices", [41, 7, -1], "index_out_of_range"),
    _field("rows", "trainable_token_indices", [41, 7, 41], "duplicate_index"),
    _field("rows", "trainable_token_indices", [41, 7, 2**40], "invalid_value", is_exact=False),
    _field("rows", "trainable_token_indices", [41, 7, True], "invalid_value", is_exact=False),
    _field("rows", "trainable_token_indices", [41, 7, 8.0], "invalid_value", is_exact=False),
    _field("rows", "trainable_token_indices", [], "invalid_value", is_exact=False),
    _field("rows", "trainable_token_indices", {}, "invalid_value", is_exact=False),
    _field("rows", "trainable_token_indices", "41,7", "invalid_value", is_exact=False),
    _field("rows", "trainable_token_indices", {"wte": IDS}, "unknown_module", is_exact=False),
    _case(
        "rows",
        "rows without their tokens",
        edit_config(trainable_token_indices=None),
        ("unsupported_feature", ROWS),
    ),
    _case(
        "rows",
        "rows and a LoRA of one matrix",
        edit_config(target_modules=["q_proj", "v_proj", "embed_tokens"]),
        ("unsupported_feature", f"{CONFIG}:{E}"),
        ("missing_tensor", A),
        ("missing_tensor", B),
    ),
    _case(
        "rows",
        "rows and the whole of one matrix",
        edit_config(modules_to_save=["embed_tokens"]),
        ("invalid_value", f"{CONFIG}:modules_to_save"),
        ("missing_tensor", EMBEDDING),
    ),
    _tensor("apart", "the head's rows missing", "missing_tensor", HEAD_ROWS, None),
    _case(
        "apart",
        "other tokens of the head that is to stay tied",
        edit_config(ensure_weight_tying=True),
        ("invalid_value", f"{CONFIG}:trainable_token_indices"),
    ),
    _tensor("alone", "rows alone missing", "missing_tensor", ALONE, None),
    _tensor("alone", "other rows for the tied head", "shape_mismatch", ALONE_HEAD, torch.ones(3, 16)),
    _case("alone", "infinite row", edit_tensors({ALONE: set_value(INF)}), ("non_finite", ALONE), is_exact=False),
    _tensor("alone", "rows of a layer", "unsupported_feature", f"{PREFIX}{E}.x.trainable_tokens_delta", torch.ones(3)),
    _field("alone", "token_indices", [1, 1, 2], "duplicate_index"),
    _field("alone", "token_indices", [1, 2, 95], "index_out_of_range"),
    _field("alone", "token_indices", ..., "missing_field", is_exact=False),
    _field("alone", "target_modules", "wte", "target_not_found"),
    _field("alone", "target_modules", ".*", "invalid_value"),
    _field("alone", "modules_to_save", ["lm_head"], "unsupported_feature"),
    _field("alone", "scale", 2, "unknown_field"),
    _tensor("low-rank", "A of the embedding missing", "missing_tensor", A, None),
    _tensor("low-rank", "A of the embedding turned", "shape_mismatch", A, torch.ones(100, 4)),
    _tensor("low-rank", "A of a larger vocabulary", "shape_mismatch", A, torch.ones(4, 101)),
    _tensor("low-rank", "B of the embedding of another rank", "shape_mismatch", B, torch.ones(16, 3)),
    _tensor("low-rank", "B of the head missing", "missing_tensor", HEAD_B, None),
    _tensor("low-rank", "NaN in B of the head", "non_finite", HEAD_B, set_value(NAN)),
    _tensor("low-rank", "a copy of a grown embedding", "added_tokens", COPY, torch.ones(108, 16)),
    _tensor("low-rank", "a copy with NaN", "non_finite", COPY, set_value(NAN)),
    _tensor("low-rank", "rows not announced", "unsupported_feature", HEAD_ROWS, torch.ones(3, 16)),
    _case(
        "low-rank",
        "DoRA without magnitudes",
        edit_config(use_dora=True),
        ("missing_tensor", MAGNITUDE),
        ("missing_tensor", HEAD_MAGNITUDE),
        is_exact=False,
    ),
    _case(
        "low-rank",
        "a bias of B at the embedding",
        edit_config(lora_bias=True),
        ("invalid_value", f"{CONFIG}:lora_bias"),
        ("missing_tensor", HEAD_BIAS_OF_B),
        is_exact=False,
    ),
    _case(
        "low-rank",
        "PiSSA of the head",
        edit_config(init_lora_weights="pissa"),
        ("unsupported_feature", f"{CONFIG}:target_modules"),
    ),
    _tensor("dora", "magnitudes of the embedding missing", "missing_tensor", MAGNITUDE, None),
    _tensor("dora", "magnitudes for every token of the embedding", "shape_mismatch", MAGNITUDE, torch.ones(100)),
    _tensor("dora", "magnitudes of the head for its inputs", "shape_mismatch", HEAD_MAGNITUDE, torch.ones(16)),
    _tensor("dora", "magnitudes of the head as a column", "shape_mismatch", HEAD_MAGNITUDE, torch.ones(100, 1)),
    _tensor("dora", "NaN in a magnitude of the head", "non_finite", HEAD_MAGNITUDE, set_value(NAN)),
    _tensor("dora", "infinite magnitude of the embedding", "non_finite", MAGNITUDE, set_value(INF)),
    _tensor("dora", "integer magnitudes", "unsupported_dtype", MAGNITUDE, torch.ones(16, dtype=torch.int32)),
    _tensor("dora", "other magnitudes again", "shape_mismatch", f"{MAGNITUDE}.weight", torch.ones(16)),
    _tensor("dora", "the head's bias missing", "missing_tensor", HEAD_BIAS, None),
    _tensor("dora", "the head's bias of another size", "shape_mismatch", HEAD_BIAS, torch.ones(16)),
    _tensor("whole", "a saved linear missing", "missing_tensor", f"{DOWN[0]}.weight", None),
    _tensor("whole", "a saved linear turned", "shape_mismatch", f"{DOWN[0]}.weight", torch.ones(24, 16)),
    _tensor("whole", "its bias missing", "missing_tensor", f"{DOWN[1]}.bias", None),
    _tensor("whole", "NaN in a saved linear", "non_finite", f"{DOWN[0]}.weight", set_value(NAN)),
    _tensor("whole", "a huge weight", "value_out_of_range", f"{DOWN[1]}.weight", set_value(1e20)),
    _case(
        "whole",
        "every target saved",
        edit_config(target_modules=["down_proj"]),
        ("target_not_found", f"{CONFIG}:target_modules"),
        is_exact=False,
    ),
    _case(
        "whole",
        "targets that end as what is saved",
        edit_config(modules_to_save=["_proj"]),
        ("invalid_value", f"{CONFIG}:modules_to_save"),
        is_exact=False,
    ),
    _tensor("again", "another bias there again", "invalid_value", AGAIN, torch.ones(16)),
    _tensor("again", "another bias of the head again", "invalid_value", HEAD_AGAIN, set_value(1)),
    _tensor("again", "a bias again of another size", "shape_mismatch", AGAIN, torch.ones(8)),
    _tensor("again", "the base's bias of another size", "shape_mismatch", ORIGINAL, torch.ones(24)),
    _tensor("again", "NaN in the base's bias of the head", "non_finite", HEAD_ORIGINAL, set_value(NAN)),
    _tensor("again", "the bias itself missing", "missing_tensor", f"{DOWN[1]}.bias", None),
    _tensor("again", "the base's weight too", "unknown_module", ORIGINAL.replace("bias", "weight"), torch.ones(16, 24)),
    _case(
        "again",
        "biases again of another option",
        edit_config(bias="lora_only"),
        *(("unsupported_feature" if "to_save" in name else "unknown_module", name) for name in BIASES_AGAIN),
        is_exact=False,
    ),
    _tensor("beside", "a saved matrix missing", "missing_tensor", EMBEDDING, None),
    _tensor("beside", "a saved matrix that has grown", "added_tokens", EMBEDDING, torch.ones(101, 16)),
    _tensor("beside", "a saved norm of another size", "shape_mismatch", NORM, torch.ones(8)),
    _tensor("beside", "a saved weight with NaN", "non_finite", f"{DOWN[0]}.weight", set_value(NAN)),
    _tensor("beside", "a saved weight of integers", "unsupported_dtype", NORM, torch.ones(16, dtype=torch.int32)),
    _tensor("beside", "a scale of a module that is saved", "unknown_module", f"{DOWN[0]}.ia3_l", torch.ones(1, 24)),
    _field("beside", "modules_to_save", ["score"], "unknown_module", is_exact=False),
    _field("beside", "modules_to_save", "mlp", "invalid_value", is_exact=False),
    _tensor("biases", "a trained bias missing", "missing_tensor", f"{DOWN[0]}.base_layer.bias", None),
    _tensor("biases", "a trained bias of another size", "shape_mismatch", f"{PREFIX}{H}.bias", torch.ones(16)),
    _tensor("biases", "NaN in a trained bias", "non_finite", f"{DOWN[1]}.base_layer.bias", set_value(NAN)),
    _case(
        "biases",
        "biases that the config does not announce",
        edit_config(bias="none"),
        *(("unexpected_tensor", f"{name}.base_layer.bias") for name in DOWN),
        ("unknown_module", f"{PREFIX}{H}.bias"),
        is_exact=False,
    ),
    _field("biases", "bias", "some", "invalid_value"),
    _field("low-rank", "target_modules", ["q_proj", "wpe"], "unsupported_target", is_exact=False),
    _tensor("saved", "the head missing", "missing_tensor", HEAD, None),
    _tensor("saved", "a head that has grown", "added_tokens", HEAD, torch.ones(104, 16)),
    _tensor("saved", "a head of another width", "shape_mismatch", HEAD, torch.ones(100, 8)),
    _tensor("saved", "NaN in the embedding", "non_finite", EMBEDDING, set_value(NAN)),
    _tensor("saved", "a norm of another size", "shape_mismatch", f"{PREFIX}model.norm.weight", torch.ones(8)),
    _field("saved", "modules_to_save", ["score"], "unknown_module", is_exact=False),
    _case(
        "saved",
        "a linear that is saved and not there",
        edit_config(modules_to_save=["embed_tokens", "lm_head", "model.norm", "down_proj"]),
        *(("missing_tensor", f"{name}.{part}") for name in DOWN for part in ("weight", "bias")),
    ),
    _field("saved", "modules_to_save", ".*", "invalid_value", is_exact=False),
)
