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


_COMMON: dict[str, Any] = {"max_length": 256, "batch_size": 8, "eval_every": 65, "max_eval_rows": 60}

SHOUT = Demo(
    "shout",
    "a LoRA of rank 8 that answers in capitals",
    is_shouted,
    {
        **_COMMON,
        "lora": {"rank": 8, "alpha": 16},
        "epochs": 3,
        "learning_rate": 5e-3,
        "save_dtype": "bfloat16",
    },
)
PIRATE = Demo(
    "pirate",
    "a rank-stabilised LoRA with a rank of its own in every kind of linear, that talks like a pirate",
    is_pirate,
    {
        **_COMMON,
        "lora": {
            "rank": 6,
            "alpha": 12,
            "rslora": True,
            "rank_pattern": {"q_proj": 4, "k_proj": 4, "o_proj": 8, "down_proj": 12},
        },
        "epochs": 3,
        "learning_rate": 5e-3,
        "save_dtype": "bfloat16",
    },
)
JSON = Demo(
    "json",
    "a sparse adapter that changes about one weight in a hundred and answers in JSON",
    is_json_answer,
    {
        **_COMMON,
        "method": "sparse",
        "sparse": {"num_entries": 40_000, "selection_steps": 16},
        "epochs": 3,
        "learning_rate": 3e-3,
        "save_dtype": "bfloat16",
    },
)
DEMOS = (SHOUT, PIRATE, JSON)
