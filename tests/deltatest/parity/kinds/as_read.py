"""PEFT types that are read as they are: LoRA and its options, SHiRA, IA3, LN tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltatest.parity.registry import Bench, Entry
from deltatest.peft_adapters import make_peft_ia3, make_peft_ln_tuning, make_peft_lora, make_peft_shira


def _with(make: Callable[..., Path], **options: Any) -> Callable[[Bench, Path], Path]:
    return lambda bench, folder: make(bench.model, folder, **options)


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
    Entry("SHiRA", "", "PEFT", _with(make_peft_shira, seed=5)),
    Entry("IA3", "", "PEFT", _with(make_peft_ia3, seed=6)),
    Entry("LN tuning", "", "PEFT", _with(make_peft_ln_tuning, seed=7)),
)
