"""The guided tour: train a LoRA and a sparse adapter, measure them, register them, and ask all of them at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaserve.tinybase import DEMO_DATA
from deltaserve_trainer.base import Base
from deltaserve_trainer.demos import JSON, PIRATE, Demo
from deltaserve_trainer.errors import TrainingError
from deltaserve_trainer.progress import Progress
from deltaserve_trainer.report import DataReport
from deltaserve_trainer.train import TrainingResult, run_training

TOUR_DEMOS = (PIRATE, JSON)
TOUR_NAMES = ("tour-pirate", "tour-json")
MAX_PROMPTS = 5
AnswerBatch = Callable[[list[tuple[str, str]]], Sequence[str]]
"""(model name, user's question) of every row, decoded in ONE mixed batch; the answers in the same order."""


@dataclass(frozen=True, slots=True)
class TourRow:
    """One prompt and the answer of every model, in the order of ``Tour.models``."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tour:
    """``models`` starts with the base. ``shows[i]`` is how many answers of model i have its demo's voice (base: 0)."""

    models: tuple[str, ...]
    results: tuple[TrainingResult, ...]
    rows: tuple[TourRow, ...]
    shows: tuple[int, ...]


def run_tour(
    *,
    base: Base,
    work_folder: Path,
    register: Callable[[TrainingResult, str], object],
    answer_batch: AnswerBatch,
    names: Sequence[str] = TOUR_NAMES,
    on_demo: Callable[[Demo, str], None] | None = None,
    on_data: Callable[[DataReport], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_trained: Callable[[TrainingResult], None] | None = None,
) -> Tour:
    """Run the whole tour; ``register`` is called with a finished run and the adapter's name and raises to refuse.

    A run that an interrupt left in ``work_folder`` is continued. Raises what ``run_training`` raises.
    """
    results = []
    for demo, name in zip(TOUR_DEMOS, names, strict=True):
        if on_demo is not None:
            on_demo(demo, name)
        result = run_training(
            demo.recipe(),
            base=base,
            data=demo.data,
            eval_data=demo.eval_data,
            out_dir=work_folder / name,
            resume=True,
            title=name,
            on_data=on_data,
            on_progress=on_progress,
        )
        if on_trained is not None:
            on_trained(result)
        register(result, name)
        results.append(result)
    prompts = tour_prompts()
    models = (base.name, *names)
    asked = [(model, prompt) for prompt in prompts for model in models]
    answers = list(answer_batch(asked))
    if len(answers) != len(asked):
        raise TrainingError(f"the engine gave {len(answers)} answers to {len(asked)} questions")
    rows = tuple(
        TourRow(prompt, tuple(answers[i * len(models) : (i + 1) * len(models)])) for i, prompt in enumerate(prompts)
    )
    shows = tuple(
        sum(demo.shows_in(row.answers[column]) for row in rows) for column, demo in enumerate(TOUR_DEMOS, start=1)
    )
    return Tour(models, tuple(results), rows, (0, *shows))


def tour_prompts() -> list[str]:
    """The questions of the table: bundled, plain user text."""
    prompts: list[str] = json.loads((DEMO_DATA / "prompts.json").read_text("utf-8"))
    return prompts[:MAX_PROMPTS]
