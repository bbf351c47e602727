"""PEFT folders that change the embedding, the head or whole modules, written by PEFT itself with random numbers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltatest.peft_adapters import edit_config

TOKENS = (41, 7, 150, 3, 88, 12)
"""Trained tokens, not in order: files have rows in the order of the config."""

KINDS = (
    "tokens",
    "tokens-apart",
    "tokens-head",
    "tokens-alone",
    "tokens-both",
    "lora-embedding",
    "lora-head",
    "lora-both",
    "lora-tied",
    "dora-embedding",
    "dora-both",
    "dora-tied",
    "bias-head",
    "saved",
    "saved-tied",
    "saved-norms",
    "saved-linears",
)


def make_vocabulary_adapter(
    kind: str,
    model: torch.nn.Module,
    folder: Path,
    *,
    target: str,
    norm: str,
    seed: int = 0,
    std: float = 0.1,
    tokens: Sequence[int] = TOKENS,
    is_conv: bool = False,
    base_name: str = "tests/tiny-base",
) -> Path:
    """A folder of one of ``KINDS``; ``target`` is a linear that a LoRA sits on, ``norm`` the end of a norm's path.

    ``lora-*`` bring copies of the base's matrices along, as PEFT writes them by default.
    """
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    path = next(name for name, module in model.named_modules() if module is embedding)
    name, ids = path.rpartition(".")[2], list(tokens)
    shared: dict[str, Any] = {"r": 3, "task_type": "CAUSAL_LM", "fan_in_fan_out": is_conv}
    given: dict[str, dict[str, Any]] = {
        "tokens": {"trainable_token_indices": ids},
        "tokens-apart": {"trainable_token_indices": {name: ids, "lm_head": ids[:2]}},
        "tokens-head": {"trainable_token_indices": {"lm_head": ids}},
        "lora-embedding": {"target_modules": [target, name]},
        "lora-head": {"target_modules": ["lm_head"]},
        "lora-both": {"target_modules": [target, name, "lm_head"]},
        "lora-tied": {"target_modules": [target, name], "ensure_weight_tying": True},
        "dora-embedding": {"target_modules": [target, name], "use_dora": True},
        "dora-both": {"target_modules": [target, name, "lm_head"], "use_dora": True},
        "dora-tied": {"target_modules": [target, name], "use_dora": True, "ensure_weight_tying": True},
        "bias-head": {"target_modules": [target, "lm_head"], "lora_bias": True, "bias": "all"},
        "saved": {"modules_to_save": [name, "lm_head"]},
        "saved-tied": {"modules_to_save": [name], "ensure_weight_tying": True},
        "saved-norms": {"modules_to_save": [norm]},
        "saved-linears": {"modules_to_save": ["mlp", norm]},
    }
    if kind == "tokens-alone":
        config: Any = TrainableTokensConfig(token_indices=ids, task_type="CAUSAL_LM")
    elif kind == "tokens-both":
        config = TrainableTokensConfig(token_indices=ids, target_modules=[name, "lm_head"], task_type="CAUSAL_LM")
    else:
        config = LoraConfig(**{**shared, "target_modules": [target], **given[kind]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part, parameter in wrapped.named_parameters():
                if "magnitude" in part or (given.get(kind, {}).get("bias") and part.endswith(".bias")):
                    size = parameter.abs().mean().clamp(min=0.5)
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * std * size)
                elif "lora_" in part:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                elif "trainable_tokens_delta" in part or (".modules_to_save." in part and parameter.dim() == 1):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 2 * std)
                elif (
                    ".modules_to_save." in part
                    and not part.endswith(f"{name}.modules_to_save.default.weight")
                    and ("lm_head" not in part)
                ):
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
                elif ".modules_to_save." in part:  # as a training does that meets some tokens only
                    parameter[ids] += torch.randn(len(ids), parameter.shape[1], generator=generator) * 2 * std
        wrapped.save_pretrained(str(folder), save_embedding_layers=kind.startswith(("lora-", "dora-")))
    edit_config(folder, base_model_name_or_path=base_name)
    (folder / "README.md").unlink(missing_ok=True)
    return folder
