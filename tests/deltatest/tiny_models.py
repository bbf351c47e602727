"""Tiny random bases of every architecture of the parity suite, as ordinary checkpoint folders.

Deterministic, fp32, two or three layers; weights are large enough that greedy decoding does not fall into one token,
and biases and norms are not left at their neutral values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

VOCAB_SIZE = 199

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Name -> (transformers model type, configuration).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-rope-scaled": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 24, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 48,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.05 * i for i in range(8)],
                "long_factor": [2.0 + 0.7 * i for i in range(8)],
                "original_max_position_embeddings": 48,
            },
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "no_rope_layers": [1, 0, 1]}),
}


def build_tiny_model(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write architecture ``name`` with random weights to ``folder`` (made if needed); returns it. No tokenizer."""
    model_type, changes = ARCHITECTURES[name]
    return save_random(AutoConfig.for_model(model_type, **{**_COMMON, **changes}), folder, seed=seed)


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration of any architecture, with the suite's common sizes."""
    return AutoConfig.for_model(model_type, **{**_COMMON, **changes})


def save_random(config: PreTrainedConfig, folder: Path, *, seed: int = 0) -> Path:
    """Save a causal model of ``config`` with random weights: matrices N(0, 0.3), embeddings N(0, 0.05), rest jittered.

    Small embeddings keep tied heads from answering with the token just read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        embedding = model.get_input_embeddings().weight
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.05 if parameter is embedding else 0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
