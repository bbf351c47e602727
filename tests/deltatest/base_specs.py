"""``BaseSpec`` of a transformers model, made the obvious way: every Linear and Conv1D outside the head."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from deltaserve_store.spec import BaseSpec, LinearSpec, NormSpec
from deltatest.tiny_models import build_tiny_model

FINGERPRINT = "5a" * 32
BASE_NAME = "tests/tiny-base"


def spec_of(model: torch.nn.Module, *, fingerprint: str = FINGERPRINT) -> BaseSpec:
    """The spec of an in-memory model; the head is left out, as the server does."""
    linears: dict[str, LinearSpec] = {}
    norms: dict[str, NormSpec] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("lm_head", "embed_out"):
            continue
        if isinstance(module, Conv1D):
            rows, cols = module.weight.shape
            linears[name] = LinearSpec(name, cols, rows, True, transposed=True)
        elif isinstance(module, torch.nn.Linear):
            linears[name] = LinearSpec(name, module.out_features, module.in_features, module.bias is not None)
        elif type(module).__name__.endswith("Norm") and not name.endswith(("q_norm", "k_norm")):
            norms[name] = NormSpec(name, module.weight.numel(), getattr(module, "bias", None) is not None)
    config = model.config
    return BaseSpec(
        fingerprint=fingerprint,
        names=(BASE_NAME,),
        model_type=config.model_type,  # type: ignore[union-attr]
        linears=linears,
        norms=norms,
        vocab_size=config.vocab_size,  # type: ignore[union-attr]
        num_layers=config.num_hidden_layers,  # type: ignore[union-attr]
        hidden_size=config.hidden_size,  # type: ignore[union-attr]
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,  # type: ignore[union-attr]
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,  # type: ignore
        registered=tuple(linears),
    )


def tiny_model(name: str, folder: Path) -> torch.nn.Module:
    """Architecture ``name`` of ``tiny_models`` with random float32 weights."""
    return AutoModelForCausalLM.from_pretrained(build_tiny_model(name, folder), dtype=torch.float32).eval()
