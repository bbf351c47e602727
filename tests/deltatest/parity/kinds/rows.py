"""Trained rows of embedding and head, whole modules, and row and column blocks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deltatest.block_adapters import make_blocks
from deltatest.grown_adapters import ADDED, KNOWN, make_grown
from deltatest.parity.registry import BASE_NAME, Bench, Entry
from deltatest.peft_adapters import base_logits, peft_logits
from deltatest.tiny_models import VOCAB_SIZE
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


def _grown(bench: Bench, folder: Path, *, kind: str) -> Path:
    vocabulary = {f"word{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="word0")))
    return make_grown(kind, bench.model, tokenizer, folder, seed=len(kind), base_name=BASE_NAME).folder


def _on_resized(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    """PEFT on a model that knows the added tokens, as their user makes it: the rows are the file's."""
    resized = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resized.resize_token_embeddings(NUM_GROWN)
    return peft_logits(resized, folder, ids)


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
NUM_GROWN = VOCAB_SIZE + len(ADDED)
_GROWN = {
    "copied": "added tokens, matrices copied",
    "trained": "added tokens, trained",
    "saved": "added tokens, whole matrices",
}
_OF_GROWN: dict[str, Any] = {
    "oracle": _on_resized,
    "num_token_ids": NUM_GROWN,
    "warm_ids": (KNOWN, VOCAB_SIZE + 2, 5, VOCAB_SIZE, VOCAB_SIZE + 1),
}
ENTRIES = (
    *(
        Entry("LoRA", variant, "PEFT", partial(_vocabulary, kind=kind), warm_ids=TOKENS)
        for kind, variant in _TOLD.items()
    ),
    Entry("Trainable tokens", "", "PEFT", partial(_vocabulary, kind="tokens-alone"), warm_ids=TOKENS),
    *(Entry("LoRA", variant, "PEFT", partial(_grown, kind=kind), **_OF_GROWN) for kind, variant in _GROWN.items()),
    Entry("Trainable tokens", "added tokens", "PEFT", partial(_grown, kind="alone"), **_OF_GROWN),
    *(
        Entry("deltaserve blocks", kind, "deltaserve", partial(_blocks, kind=kind), _with_blocks, "edited weights")
        for kind in ("rows", "cols", "both", "s2ft")
    ),
)
