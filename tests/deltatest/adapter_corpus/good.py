"""The tiny base that every case is for, and good adapters of it: what PEFT 0.21 and the project itself would write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from deltaserve_store.formats.deltaserve_sparse import write_sparse_adapter
from deltaserve_store.parsed import SparseDelta
from deltaserve_store.spec import BaseSpec, LinearSpec, NormSpec

FINGERPRINT = "ab" * 32
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
Q0_A = f"{PREFIX}{Q0}.lora_A.weight"
Q0_B = f"{PREFIX}{Q0}.lora_B.weight"
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"


def corpus_base(*, transposed: bool = False) -> BaseSpec:
    """A two-layer base of width 16 with ``q_proj``, ``v_proj`` and ``down_proj``; vocabulary 100."""
    linears = {}
    for layer in range(2):
        for path, out_features, in_features in (
            ("self_attn.q_proj", 16, 16),
            ("self_attn.v_proj", 8, 16),
            ("mlp.down_proj", 16, 24),
        ):
            name = f"model.layers.{layer}.{path}"
            linears[name] = LinearSpec(name, out_features, in_features, False, transposed)
    paths = [f"model.layers.{layer}.input_layernorm" for layer in range(2)] + ["model.norm"]
    norms = {name: NormSpec(name, 16) for name in paths}
    ends = [f"layers.{layer}.{end}" for layer in range(2) for end in ("attn_in", "attn_out", "mlp_in", "mlp_out")]
    return BaseSpec(
        FINGERPRINT,
        ("tests/corpus-base",),
        "llama",
        linears,
        vocab_size=100,
        num_layers=2,
        hidden_size=16,
        num_tokens=90,
        norms=norms,
        points=frozenset([*ends, "embed_out", "final_hidden"]),
        kv_heads=2,
        head_dim=4,
        registered=tuple(linears),
    )


def write_good_lora(folder: Path, *, rank: int = 4, seed: int = 0, fan_in_fan_out: bool = False) -> Path:
    """A PEFT LoRA of rank ``rank`` on ``q_proj`` and ``v_proj`` of both layers, as PEFT 0.21 would write it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, linear in corpus_base().linears.items():
        if name.endswith(("q_proj", "v_proj")):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    config = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "tests/corpus-base",
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "r": rank,
        "rank_pattern": {},
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def write_good_shira(folder: Path, *, rank: int = 2, seed: int = 0) -> Path:
    """A PEFT SHiRA of ``rank`` on ``v_proj`` of both layers."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, linear in corpus_base().linears.items():
        if name.endswith("v_proj"):
            count = rank * (linear.in_features + linear.out_features)
            flat = torch.randperm(linear.in_features * linear.out_features, generator=generator)[:count].sort().values
            indices = torch.stack([flat // linear.in_features, flat % linear.in_features]).to(torch.int32)
            tensors[f"{PREFIX}{name}.shira_indices"] = indices
            tensors[f"{PREFIX}{name}.shira_weight"] = torch.randn(count, generator=generator)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": "tests/corpus-base",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_weights": True,
        "mask_type": "random",
        "modules_to_save": None,
        "peft_type": "SHIRA",
        "peft_version": "0.21.2",
        "r": rank,
        "random_seed": 7,
        "revision": None,
        "target_modules": ["v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def write_good_sparse(folder: Path, *, count: int = 5, seed: int = 0, fingerprint: str = FINGERPRINT) -> Path:
    """An adapter of the project's own format with ``count`` entries in ``q_proj`` of each layer."""
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for layer in range(2):
        flat = torch.randperm(256, generator=generator)[:count]
        name = f"model.layers.{layer}.self_attn.q_proj"
        deltas.append(SparseDelta(name, flat // 16, flat % 16, torch.randn(count, generator=generator)))
    write_sparse_adapter(folder, deltas, fingerprint, base_name="tests/corpus-base", method="magnitude")
    return folder


GOOD: dict[str, Callable[[Path], Path]] = {
    "lora": write_good_lora,
    "shira": write_good_shira,
    "sparse": write_good_sparse,
}
