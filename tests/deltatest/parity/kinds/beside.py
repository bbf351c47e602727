"""Modules saved whole beside kinds other than LoRA, and beside trained biases: matters of every kind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from deltatest import rotation_kinds
from deltatest.parity.registry import Bench, Entry
from deltatest.peft_kinds import CASES, KindCase, near_the_base, write_case

SAVED = ["embed_tokens", "lm_head", "norm", "gate_proj"]
_KINDS = {
    "LoRA": KindCase("LoraConfig", {"r": 4}),
    "IA3": KindCase("IA3Config", {"feedforward_modules": []}, 0.5),
    "VeRA": CASES["vera"],
    "OFT": rotation_kinds.CASES["oft"],
}


def _write(bench: Bench, folder: Path, *, kind: str, **options: Any) -> Path:
    given = {"modules_to_save": SAVED, **options}
    return write_case(bench.model, folder, near_the_base(_KINDS[kind], bench.model), seed=5, **given)


_BIASED: dict[str, Any] = {"bias": "all", "modules_to_save": [*SAVED, "k_proj"]}
"""Of ``k_proj``, saved whole, PEFT writes three biases: the trained one twice, and the base's."""
ENTRIES = (
    Entry("LoRA", "all biases and whole modules", "PEFT", partial(_write, kind="LoRA", **_BIASED)),
    *(Entry(kind, "whole modules", "PEFT", partial(_write, kind=kind)) for kind in ("IA3", "VeRA", "OFT")),
)
