"""PEFT types that are read as they are: LoRA and its options, SHiRA, IA3, LN tuning."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deltaserve_store.file_names import INITIAL_TENSORS, PEFT_TENSORS
from deltatest.parity.registry import Bench, Entry
from deltatest.peft_adapters import (
    base_logits,
    edit_config,
    make_peft_ia3,
    make_peft_ln_tuning,
    make_peft_lora,
    make_peft_shira,
)


def _with(make: Callable[..., Path], **options: Any) -> Callable[[Bench, Path], Path]:
    return lambda bench, folder: make(bench.model, folder, **options)


def _variant(config: str, field: str, **options: Any) -> Callable[[Bench, Path], Path]:
    def write(bench: Bench, folder: Path) -> Path:
        from peft.tuners.lora import config as configs

        given = {field: getattr(configs, config)(**options)}
        return make_peft_lora(bench.model, folder, seed=12, rank=4, std=0.2, **given)

    return write


def _with_its_start(bench: Bench, folder: Path) -> Path:
    """As CorDA leaves it: what it began with, and what it became."""
    options = {"rank": 4, "alpha": 8, "std": 0.2}
    before = make_peft_lora(bench.model, folder / "before", seed=10, **options)
    (before / PEFT_TENSORS).rename(folder / INITIAL_TENSORS)
    shutil.rmtree(before)
    make_peft_lora(bench.model, folder, seed=11, **options)
    edit_config(folder, init_lora_weights="corda", corda_config={"corda_method": "ipm"})
    return folder


def _less_its_start(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    """From the tensors of the files, in the weights."""
    edited = copy.deepcopy(model)
    for file, sign in ((PEFT_TENSORS, 2.0), (INITIAL_TENSORS, -2.0)):
        tensors = load_file(folder / file)
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                with torch.no_grad():
                    edited.get_submodule(module).weight += sign * (tensors[name.replace("lora_A", "lora_B")] @ a)
    return base_logits(edited, ids)


ENTRIES = (
    Entry("LoRA", "", "PEFT", _with(make_peft_lora, seed=1)),
    Entry(
        "LoRA",
        "patterns, rank-stabilised",
        "PEFT",
        _with(make_peft_lora, seed=2, use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 4.0}),
    ),
    Entry("LoRA", "DoRA", "PEFT", _with(make_peft_lora, seed=3, use_dora=True)),
    Entry("LoRA", "bias of B", "PEFT", _with(make_peft_lora, seed=4, lora_bias=True)),
    Entry("LoRA", "PiSSA", "PEFT", _with(make_peft_lora, seed=8, init_lora_weights="pissa", rank=4, std=0.2)),
    Entry("LoRA", "OLoRA", "PEFT", _with(make_peft_lora, seed=9, init_lora_weights="olora", rank=4, std=0.2)),
    Entry(
        "LoRA",
        "activated in the middle",
        "PEFT",
        _with(make_peft_lora, seed=10, alora_invocation_tokens=[7, 9, 7]),
        invocation=(7, 9, 7),
    ),
    Entry("LoRA", "its start beside it", "PEFT", _with_its_start, _less_its_start, "edited weights"),
    Entry("LoRA", "KaSA", "PEFT", _variant("KasaConfig", "kasa_config")),
    Entry(
        "LoRA",
        "blocks",
        "PEFT",
        _variant("BdLoraConfig", "use_bdlora", target_modules_bd_b=["proj"], nblocks=2),
    ),
    Entry("SHiRA", "", "PEFT", _with(make_peft_shira, seed=5)),
    Entry("IA3", "", "PEFT", _with(make_peft_ia3, seed=6)),
    Entry("LN tuning", "", "PEFT", _with(make_peft_ln_tuning, seed=7)),
)
