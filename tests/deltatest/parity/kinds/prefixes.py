"""PEFT types of virtual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaserve_store.formats.peft_prefixes import PREFIX_KINDS
from deltatest.parity.registry import Bench, Entry
from deltatest.prefix_adapters import CASES, Oracle, make_prefix

_TYPES = {
    "PrefixTuningConfig": "PREFIX_TUNING",
    "CartridgeConfig": "CARTRIDGE",
    "PromptTuningConfig": "PROMPT_TUNING",
    "PromptEncoderConfig": "P_TUNING",
    "MultitaskPromptTuningConfig": "MULTITASK_PROMPT_TUNING",
    "CPTConfig": "CPT",
}
_VARIANTS = {"prefix-projected": "projected", "p-tuning-lstm": "LSTM"}


def _write(bench: Bench, folder: Path, *, case: str) -> Path:
    return make_prefix(bench.model, folder, case, seed=len(case))


def _of_peft(model: Any, folder: Path, ids: Sequence[int]) -> Tensor:
    return Oracle(model, folder).logits(ids)


ENTRIES = tuple(
    Entry(PREFIX_KINDS[_TYPES[config]].title, _VARIANTS.get(name, ""), "PEFT", partial(_write, case=name), _of_peft)
    for name, (config, _, _) in CASES.items()
)
