"""The three demonstration adapters of the embedded base: what they are trained on, how, and how to tell them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaserve.tinybase import DEMO_DATA
from deltaserve_trainer.recipe import Recipe, resolve_recipe


@dataclass(frozen=True, slots=True)
class Demo:
    """``shows_in`` says whether an answer has the adapter's voice; ``says`` is a line for people."""

    name: str
    says: str
    shows_in: Callable[[str], bool]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return DEMO_DATA / f"{self.name}.jsonl"

    @property
    def eval_data(self) -> Path:
        return DEMO_DATA / f"{self.name}.eval.jsonl"

    def recipe(self, **overrides: Any) -> Recipe:
        return resolve_recipe("quick", {**self.settings, **overrides})


def is_shouted(answer: str) -> bool:
    letters = [char for char in answer if char.isalpha()]
    return bool(letters) and sum(char.isupper() for char in letters) >= 0.95 * len(letters)


def is_json_answer(answer: str) -> bool:
    try:
        content = json.loads(answer)
    except ValueError:
        return False
    return isinstance(content, dict) and isinstance(content.get("answer"), str)


def is_pirate(answer: str) -> bool:
    return answer.startswith("Arr!") and answer.rstrip().endswith("matey!")


_COMMON: dict[str, Any] = {"max_length": 512, "eval_every": 100, "max_eval_rows": 60, "save_dtype": "bfloat16"}

SHOUT = Demo(
    "shout",
    "a LoRA of rank 8 that answers in capitals",
    is_shouted,
    # Capitals fall into other tokens than words do, so every word is learned anew: the longest of the three runs.
    {
        **_COMMON,
        "lora": {"rank": 8, "alpha": 32},
        "max_steps": 600,
        "batch_size": 16,
        "learning_rate": 3e-3,
    },
)
PIRATE = Demo(
    "pirate",
    "a rank-stabilised LoRA, its ranks differing between kinds of linears, that talks like a pirate",
    is_pirate,
    {
        **_COMMON,
        "lora": {
            "rank": 6,
            "alpha": 12,
            "rslora": True,
            "rank_pattern": {"q_proj": 4, "k_proj": 4, "o_proj": 8, "down_proj": 12},
        },
        "max_steps": 400,
        "batch_size": 8,
        "learning_rate": 3e-3,
    },
)
JSON = Demo(
    "json",
    "a sparse adapter that changes about one weight in seventy and answers in JSON",
    is_json_answer,
    {
        **_COMMON,
        "method": "sparse",
        "sparse": {"num_entries": 42_000, "selection_steps": 32},
        "max_steps": 600,
        "batch_size": 8,
        "learning_rate": 4e-3,
    },
)
DEMOS = (SHOUT, PIRATE, JSON)
