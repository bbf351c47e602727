"""The frozen base as the trainer sees it: a plain transformers model whose linears can be found by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaserve_store.spec import BaseSpec, LinearSpec, NormSpec
from deltaserve_trainer.errors import RecipeInvalid


@dataclass(frozen=True, slots=True)
class Base:
    """Where the base lies and how adapters name it: its served id and the fingerprint of its content."""

    folder: Path
    name: str
    fingerprint: str


def load_model(folder: Path, *, device: str = "cpu") -> nn.Module:
    """The base in float32, frozen, in evaluation mode; from disk only, safetensors only, no code from the folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the caller draws the only bar
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
        )
    finally:
        if had_bar:
            logging.enable_progress_bar()
    return model.requires_grad_(False).eval().to(device)


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """Linears of the decoder layers by module path, in module order; the output head is not one of them."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def norms_of(model: nn.Module, size: int) -> dict[str, NormSpec]:
    """Norms of the whole hidden state, by what they are called: the trainer only measures adapters that have some."""
    found = {}
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, torch.Tensor) and weight.shape == (size,):
            found[name] = NormSpec(name, size, bias is not None)
    return found


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight is stored ``[in, out]`` (GPT-2's Conv1D)."""
    return not isinstance(linear, nn.Linear)


def weight_of(linear: nn.Module) -> torch.Tensor:
    return linear.get_parameter("weight")


def target_linears(model: nn.Module, targets: Sequence[str] | None) -> dict[str, nn.Module]:
    """The linears whose path is or ends in one of ``targets`` (None: all). Raises ``RecipeInvalid`` for strangers."""
    linears = linears_of(model)
    if targets is None:
        return linears
    unknown = [t for t in targets if not any(_matches(name, t) for name in linears)]
    if unknown or not targets:
        allowed = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
        raise RecipeInvalid(
            f"target_modules {', '.join(unknown) or 'is empty'}: no such linear in this base; allowed: {allowed}",
            param="target_modules",
        )
    return {name: linear for name, linear in linears.items() if any(_matches(name, t) for t in targets)}


def spec_of(model: Any, base: Base) -> BaseSpec:
    """The base as the store's checks need it."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    linears = {}
    for name, linear in linears_of(model).items():
        rows, columns = weight_of(linear).shape
        transposed = is_transposed(linear)
        out_features, in_features = (columns, rows) if transposed else (rows, columns)
        has_bias = getattr(linear, "bias", None) is not None
        linears[name] = LinearSpec(name, out_features, in_features, has_bias, transposed)
    heads = config.num_attention_heads
    return BaseSpec(
        fingerprint=base.fingerprint,
        names=(base.name,),
        model_type=config.model_type,
        linears=linears,
        norms=norms_of(model, config.hidden_size),
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        tied_embeddings=bool(getattr(model.config, "tie_word_embeddings", False)),
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        registered=tuple(linears),
    )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
