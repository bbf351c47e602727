"""A good adapter of every converted PEFT type, of random values in the tensors that its reader lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deltaserve_store.formats.peft_kinds.reader import TensorRule
from deltaserve_store.formats.peft_kinds.table import READERS
from deltatest.adapter_corpus import CONFIG, PREFIX, TENSORS, corpus_base

V0 = "model.layers.0.self_attn.v_proj"
V0_TENSOR = f"{PREFIX}{V0}"
TARGETED = ("q_proj", "v_proj")

CONFIGS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 3, "r": 8, "lora_alpha": 6, "rank_pattern": {f"{V0}.lora_E": [True, False, True]}},
    "vera": {"r": 4, "projection_prng_key": 3, "save_projection": True},
    "loha": {"r": 2, "alpha": 4},
    "lokr": {"r": 1, "alpha": 4},
    "miss": {"r": 4},
    "gralora": {"r": 4, "alpha": 8, "gralora_k": 2, "hybrid_r": 1},
    "delora": {"r": 3},
    "vblora": {"r": 2, "num_vectors": 6, "vector_length": 4, "topk": 2},
    "unilora": {"r": 2, "theta_d_length": 40, "save_indices": True},
    "tinylora": {"r": 2, "u": 3, "weight_tying": 1.0},
    "hra": {"r": 2, "apply_GS": False},
    "supertuning": {"sparsity": 0.9},
    "fourierft": {"n_frequency": 3},
    "waveft": {"n_frequency": 5},
    "c3a": {"block_size": 8},
    "randlora": {"r": 3, "randlora_alpha": 6},
    "hira": {"r": 2},
    "deft": {"r": 2, "decomposition_method": "qr"},
    "oft": {
        "r": 0,
        "oft_block_size": 4,
        "coft": False,
        "eps": 6e-5,
        "block_share": False,
        "use_cayley_neumann": False,
        "num_cayley_neumann_terms": 5,
    },
    "road": {"variant": "road_1", "group_size": 4},
    "boft": {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 2},
    "beft": {},
    "pvera": {"r": 4, "projection_prng_key": 3, "save_projection": True},
    "psoft": {
        "r": 3,
        "psoft_orth": True,
        "psoft_mag_a": True,
        "psoft_mag_b": True,
        "ab_svd_init": "psoft_init",
        "use_cayley_neumann": False,
        "num_cayley_neumann_terms": 5,
    },
    "glora": {"r": 2, "config_A_B": "lora", "config_C": "none", "config_D_E": "none"},
    "frod": {"sparse_rate": 0.05},
}


def write_good_kind(folder: Path, kind: str) -> Path:
    """An adapter of ``kind`` on ``q_proj`` and ``v_proj`` of both layers, with random values."""
    folder.mkdir(parents=True, exist_ok=True)
    reader_type = READERS[kind.upper()]
    config = {
        "peft_type": kind.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tests/corpus-base",
        "target_modules": list(TARGETED),
        **CONFIGS[kind],
    }
    linears = tuple(linear for name, linear in corpus_base().linears.items() if name.endswith(TARGETED))
    reader = reader_type(config, linears, CONFIG)
    rules = dict(reader.shared_layout())
    for linear in linears:
        rules.update({f"{PREFIX}{linear.name}.{suffix}": rule for suffix, rule in reader.layout(linear).items()})
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _random(rule, generator) for name, rule in rules.items()}
    for name in tensors:  # a copy that PEFT keeps beside a linear
        shared = f"base_model.{name.rpartition('.')[2]}"
        tensors[name] = tensors.get(shared, tensors[name]).clone()
        if name.endswith(".zeros"):
            tensors[name] = torch.zeros_like(tensors[name])
        if "frod_s_" in name:  # all linears here have 16 inputs
            tensors[name] = tensors[name] % 16 if "indices" in name else torch.full_like(tensors[name], 16)
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def _random(rule: TensorRule, generator: torch.Generator) -> torch.Tensor:
    if "F32" in rule.dtypes:
        return torch.randn(rule.shape, generator=generator)
    count = 1
    for size in rule.shape:
        count *= size
    return (torch.arange(count) % 40).to(torch.int32 if "I32" in rule.dtypes else torch.int64).reshape(rule.shape)


GOOD_KINDS: dict[str, Callable[[Path], Path]] = {kind: partial(write_good_kind, kind=kind) for kind in CONFIGS}
