"""Modules saved whole beside kinds other than LoRA; trained biases, too, are a matter of every kind."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from deltatest import rotation_kinds
from deltatest.parity.registry import Bench, Entry
from deltatest.peft_kinds import CASES, KindCase, near_the_base, write_case

SAVED = ["embed_tokens", "lm_head", "norm", "gate_proj"]
_KINDS = {
    "IA3": KindCase("IA3Config", {"feedforward_modules": []}, 0.5),
    "VeRA": CASES["vera"],
    "OFT": rotation_kinds.CASES["oft"],
}


def _write(bench: Bench, folder: Path, *, kind: str) -> Path:
    return write_case(bench.model, folder, near_the_base(_KINDS[kind], bench.model), seed=5, modules_to_save=SAVED)


ENTRIES = tuple(Entry(kind, "whole modules", "PEFT", partial(_write, kind=kind)) for kind in _KINDS)
