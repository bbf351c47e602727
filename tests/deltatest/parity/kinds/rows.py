"""Trained rows of embedding and head, whole modules, and row and column blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deltatest.block_adapters import make_blocks
from deltatest.parity.registry import BASE_NAME, Bench, Entry
from deltatest.peft_adapters import base_logits
from deltatest.vocabulary_adapters import TOKENS, make_vocabulary_adapter


def _vocabulary(bench: Bench, folder: Path, *, kind: str) -> Path:
    options: dict[str, Any] = {"target": "q_proj", "norm": "input_layernorm", "base_name": BASE_NAME}
    return make_vocabulary_adapter(kind, bench.model, folder, seed=len(kind), **options)


def _blocks(bench: Bench, folder: Path, *, kind: str) -> Path:
    return make_blocks(kind, bench.spec, folder, seed=len(kind))


def _with_blocks(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    edited = copy.deepcopy(model)
    tensors = load_file(folder / "adapter.safetensors")
    for name in (key.removesuffix(".block") for key in tensors if key.endswith(".block")):
        weight = edited.get_submodule(name).weight
        every_row, every_col = (torch.arange(size) for size in weight.shape)
        rows, cols = tensors.get(f"{name}.rows", every_row), tensors.get(f"{name}.cols", every_col)
        with torch.no_grad():
            weight[rows.long()[:, None], cols.long()] += tensors[f"{name}.block"]
    return base_logits(edited, ids)


_TOLD = {
    "tokens": "trained tokens",
    "tokens-apart": "trained tokens of the head",
    "lora-both": "embedding and head",
    "dora-both": "DoRA of embedding and head",
    "bias-head": "bias of the head",
    "saved": "whole embedding and head",
    "saved-norms": "whole norms",
    "saved-linears": "whole linears",
}
ENTRIES = (
    *(
        Entry("LoRA", variant, "PEFT", partial(_vocabulary, kind=kind), warm_ids=TOKENS)
        for kind, variant in _TOLD.items()
    ),
    Entry("Trainable tokens", "", "PEFT", partial(_vocabulary, kind="tokens-alone"), warm_ids=TOKENS),
    *(
        Entry("deltaserve blocks", kind, "deltaserve", partial(_blocks, kind=kind), _with_blocks, "edited weights")
        for kind in ("rows", "cols", "both", "s2ft")
    ),
)
