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


def vocabulary_base(*, is_tied: bool = True) -> BaseSpec:
    """The corpus's base with an embedding and a head, by default tied."""
    return replace(
        corpus_base(), embedding=LinearSpec(E, 16, 100), head=LinearSpec(H, 100, 16), tied_embeddings=is_tied
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
VOCABULARY_GOOD: dict[str, Callable[[Path], Path]] = {
    "rows": _lora_with({ROWS: _randn(3, 16)}, trainable_token_indices=IDS),
    "apart": _lora_with(
        {ROWS: _randn(3, 16), HEAD_ROWS: _randn(1, 16)}, trainable_token_indices={"embed_tokens": IDS, "lm_head": [5]}
    ),
    "alone": _write_alone,
    "low-rank": _lora_with(_LOW_RANK, target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"]),
    "saved": _lora_with(
        {EMBEDDING: _randn(100, 16), HEAD: _randn(100, 16), f"{PREFIX}model.norm.weight": _randn(16)},
        modules_to_save=["embed_tokens", "lm_head", "model.norm"],
    ),
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
        "DoRA of the embedding",
        edit_config(use_dora=True),
        ("unsupported_feature", f"{CONFIG}:target_modules"),
        is_exact=False,
    ),
    _field("low-rank", "target_modules", ["q_proj", "wpe"], "unsupported_target", is_exact=False),
    _tensor("saved", "the head missing", "missing_tensor", HEAD, None),
    _tensor("saved", "a head that has grown", "added_tokens", HEAD, torch.ones(104, 16)),
    _tensor("saved", "a head of another width", "shape_mismatch", HEAD, torch.ones(100, 8)),
    _tensor("saved", "NaN in the embedding", "non_finite", EMBEDDING, set_value(NAN)),
    _tensor("saved", "a norm of another size", "shape_mismatch", f"{PREFIX}model.norm.weight", torch.ones(8)),
    _field("saved", "modules_to_save", ["score"], "unknown_module", is_exact=False),
    _field("saved", "modules_to_save", ["down_proj"], "unsupported_feature", is_exact=False),
    _field("saved", "modules_to_save", ".*", "invalid_value", is_exact=False),
)
