"""From a recipe and a data file to a finished run directory. Reads straight down."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve_trainer.base import Base, load_model
from deltaserve_trainer.batches import BatchPlan, collate
from deltaserve_trainer.card import render_card
from deltaserve_trainer.checkpoint import newest_checkpoint
from deltaserve_trainer.data import Dataset, Example, read_dataset, split_held_out
from deltaserve_trainer.encoding import EncodedExample, Encoder
from deltaserve_trainer.errors import DataInvalid, ResumeRefused, TrainingInterrupted
from deltaserve_trainer.evaluate import BUNDLED_GENERAL_TEXT, NUM_SAMPLES, Evaluation, evaluate_method, read_general
from deltaserve_trainer.interrupt import StopSignals
from deltaserve_trainer.loop import Loop, LoopData
from deltaserve_trainer.loss import summed_loss
from deltaserve_trainer.methods import Method, all_finite, build_method
from deltaserve_trainer.plots import plot_loss
from deltaserve_trainer.progress import Progress
from deltaserve_trainer.recipe import Recipe, load_recipe
from deltaserve_trainer.report import DataReport, encode_all, report_on
from deltaserve_trainer.run_folder import RunFolder

MAX_PARITY_PROMPTS = 4
MAX_PARITY_TOKENS = 64


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished run. ``adapter_folder`` holds the best state, ready for ``register``.

    ``parity_prompts`` are token ids of held-out rows; ``num_entries`` counts the numbers in the adapter.
    """

    run_folder: Path
    base: Base
    recipe: Recipe
    evaluation: Evaluation
    data: dict[str, Any]
    best_step: int
    num_steps: int
    num_tokens: int
    train_seconds: float
    num_entries: int
    is_finite: bool
    parity_prompts: tuple[tuple[int, ...], ...]

    @property
    def adapter_folder(self) -> Path:
        return self.run_folder / "best"

    @property
    def plot(self) -> Path:
        return self.run_folder / "loss.png"


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The rows of a run. ``report`` is what the data check found."""

    train: list[EncodedExample]
    target: list[EncodedExample]
    target_examples: tuple[Example, ...]
    report: DataReport
    digests: dict[str, str]


def check_data(
    recipe: Recipe, *, base_folder: Path, data: Path, eval_data: Path | None = None
) -> tuple[PreparedData, Encoder]:
    """Read, split, encode and examine the data; raises ``DataInvalid`` with every bad line."""
    dataset = read_dataset(data, recipe.data_format)
    digests = {"data": dataset.sha256}
    if eval_data is None:
        train, held_out = split_held_out(dataset, recipe.held_out_fraction)
    else:
        held_out_set = read_dataset(eval_data)
        train, held_out = dataset.examples, held_out_set.examples
        digests["eval_data"] = held_out_set.sha256
    held_out = held_out[: recipe.max_eval_rows]
    encoder = Encoder.from_folder(base_folder, recipe.max_length)
    encoded, dropped = encode_all(encoder, train)
    target, _ = encode_all(encoder, held_out)
    _require_rows(dataset, encoded, target, recipe.max_length)
    report = report_on(dataset, train, held_out, encoded, target, dropped, encoder)
    return PreparedData(encoded, target, held_out, report, digests), encoder


def run_training(
    recipe: Recipe,
    *,
    base: Base,
    data: Path,
    out_dir: Path,
    eval_data: Path | None = None,
    general_data: Path | None = None,
    resume: bool = False,
    title: str | None = None,
    device: str = "cpu",
    on_data: Callable[[DataReport], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainingResult:
    """Train, keep the best state, evaluate it against the base, write the run directory.

    Forgetting is measured on ``general_data``, or on the bundled general text.

    Raises ``DataInvalid``, ``RecipeInvalid``, ``ResumeRefused``, ``TrainingDiverged``; and ``TrainingInterrupted``
    after SIGINT or SIGTERM, once the state is saved. ``resume`` continues from the newest complete checkpoint and ends
    in the same state as a run that was never stopped.
    """
    report_progress = on_progress or (lambda progress: None)
    prepared, encoder = check_data(recipe, base_folder=base.folder, data=data, eval_data=eval_data)
    if on_data is not None:
        on_data(prepared.report)
    general_file = general_data or BUNDLED_GENERAL_TEXT
    general = read_general(general_file, encoder, recipe.max_eval_rows)
    prepared.digests["general_data"] = hashlib.sha256(general_file.read_bytes()).hexdigest()
    folder = RunFolder(out_dir)
    folder.open(_identity(recipe, base, prepared), resume=resume)
    if folder.is_finished:
        return load_result(out_dir, base)
    folder.write("recipe.json", recipe.model_dump(mode="json"))
    folder.write("data.json", {**prepared.report.to_json(), **_data_facts(prepared)})

    with StopSignals() as stop:
        checkpoint = newest_checkpoint(folder.checkpoints)
        model = load_model(base.folder, device=device)
        plan = BatchPlan([len(row.input_ids) for row in prepared.train], recipe.batch_size, recipe.seed)

        def loss_of_batch(live: nn.Module, i: int) -> Tensor:
            batch = collate([prepared.train[row] for row in plan.rows(i)], encoder.pad_token_id)
            return summed_loss(live, batch, recipe.precision) / batch.num_trained

        def on_selection_step(step: int, total: int) -> None:
            report_progress(Progress("selecting", step, total))
            if stop.received is not None:
                raise TrainingInterrupted(stop.received, out_dir, 0)

        method = build_method(
            model,
            recipe,
            loss_of_batch=loss_of_batch,
            structure=checkpoint.part("structure") if checkpoint else None,
            on_selection_step=on_selection_step,
        )
        rows = LoopData(prepared.train, prepared.target, general, encoder.pad_token_id)
        loop = Loop(method, recipe, rows, folder, stop, report_progress)
        result = loop.run(checkpoint)

    method.save(folder.last, base, recipe.save_dtype)
    is_finite = _take_best(method, result.best, recipe.save_dtype)
    method.save(folder.best, base, recipe.save_dtype)
    evaluation = evaluate_method(
        method,
        encoder,
        target=prepared.target,
        general=general,
        sample_rows=prepared.target_examples[:NUM_SAMPLES],
        batch_size=recipe.batch_size,
        precision="float32",
    )
    counters = result.counters
    facts = {
        "evaluation": evaluation.to_json(),
        "best_step": counters.best_step,
        "num_steps": counters.step,
        "num_tokens": counters.num_tokens,
        "train_seconds": counters.train_seconds,
        "num_entries": method.num_entries(),
        "is_finite": is_finite,
        "parity_prompts": [row.input_ids[:MAX_PARITY_TOKENS] for row in prepared.target[:MAX_PARITY_PROMPTS]],
        "versions": _versions(),
        "title": title or out_dir.name,
    }
    folder.write("evaluation.json", facts)
    plot_loss(folder.metrics(), folder.plot, title=f"{facts['title']} ({recipe.method})", best_step=counters.best_step)
    finished = load_result(out_dir, base)
    write_card(finished)
    folder.write_manifest()
    return finished


def load_result(run_folder: Path, base: Base) -> TrainingResult:
    """A finished run from its directory. Raises ``ResumeRefused`` for an unfinished run or another base."""
    folder = RunFolder(run_folder)
    facts, identity, data = folder.read("evaluation.json"), folder.read("run.json"), folder.read("data.json")
    if not facts or not identity or not data:
        raise ResumeRefused(f"{run_folder.name} holds no finished run; continue it with --resume first")
    if identity["base"] != base.fingerprint:
        raise ResumeRefused(f"{run_folder.name} was trained on base {identity['base']}, this one is {base.fingerprint}")
    return TrainingResult(
        run_folder=run_folder,
        base=base,
        recipe=load_recipe(run_folder / "recipe.json"),
        evaluation=Evaluation.from_json(facts["evaluation"]),
        data=data,
        parity_prompts=tuple(tuple(prompt) for prompt in facts["parity_prompts"]),
        **{key: facts[key] for key in _RESULT_FACTS},
    )


_RESULT_FACTS = ("best_step", "num_steps", "num_tokens", "train_seconds", "num_entries", "is_finite")


def write_card(result: TrainingResult, parity: dict[str, Any] | None = None) -> None:
    """README.md beside the adapter files."""
    facts = RunFolder(result.run_folder).read("evaluation.json")
    card = render_card(
        title=facts["title"],
        base=result.base,
        recipe=result.recipe,
        data=result.data,
        evaluation=result.evaluation,
        best_step=result.best_step,
        num_entries=result.num_entries,
        parity=parity,
    )
    (result.adapter_folder / "README.md").write_text(card, "utf-8")


def _take_best(method: Method, best: dict[str, Tensor], save_dtype: str) -> bool:
    """Put the best parameters into the model, rounded as the file will round them. Returns whether all are finite."""
    dtype = getattr(torch, save_dtype)
    for name, parameter in method.parameters().items():
        parameter.data.copy_(best[name].to(dtype))
    return all_finite(method.parameters().values())


def _require_rows(dataset: Dataset, train: list[EncodedExample], target: list[EncodedExample], max_length: int) -> None:
    for rows, which in ((train, "training"), (target, "held-out")):
        if not rows:
            raise DataInvalid(
                dataset.name,
                [f"no {which} row has a trained token within max_length {max_length}; raise max_length"],
                1,
            )


def _identity(recipe: Recipe, base: Base, prepared: PreparedData) -> dict[str, Any]:
    return {"base": base.fingerprint, "recipe": recipe.model_dump(mode="json"), "data": prepared.digests}


def _data_facts(prepared: PreparedData) -> dict[str, Any]:
    return {"sha256": prepared.digests["data"], "digests": prepared.digests}


def _versions() -> dict[str, str]:
    import platform

    import peft
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {**found, "peft": peft.__version__}
