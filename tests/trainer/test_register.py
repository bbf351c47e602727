"""Nothing is registered unless the adapter beats the base and the engine computes what the trainer computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import SparseDelta
from deltaserve_trainer.base import Base, load_model, spec_of
from deltaserve_trainer.errors import GateRefused, ParityFailed, ResumeRefused
from deltaserve_trainer.recipe import resolve_recipe
from deltaserve_trainer.register import register
from deltaserve_trainer.train import TrainingResult, load_result, run_training
from deltatest.trainer_base import make_base, write_pairs

Answer = Callable[[list[list[int]]], list[Tensor]]


@pytest.fixture(scope="module", params=["lora", "sparse"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    make_base(folder / "base")
    overrides: dict[str, Any] = {"max_steps": 10, "batch_size": 4, "learning_rate": 1e-2, "method": request.param}
    if request.param == "sparse":
        overrides["sparse"] = {"num_entries": 400, "selection_steps": 2}
    return run_training(
        resolve_recipe("quick", overrides),
        base=Base(folder / "base", "tiny/base", "ef" * 32),
        data=write_pairs(folder / "pairs.jsonl", 40),
        out_dir=folder / "run",
    )


def _engine(result: TrainingResult, *, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Answer:
    """A stand-in for the engine: folds the adapter's file into the base, ``scale`` times."""
    model = load_model(result.base.folder)
    spec = spec_of(model, result.base)
    for delta in read_adapter(result.adapter_folder, spec).deltas:
        weight = model.get_submodule(delta.module).get_parameter("weight")
        if isinstance(delta, SparseDelta):
            weight.data[delta.rows.long(), delta.cols.long()] += scale * delta.values
        else:
            weight.data += scale * delta.scaling * delta.b @ delta.a
    model.to(dtype)

    @torch.no_grad()
    def answer(prompts: list[list[int]]) -> list[Tensor]:
        return [model(input_ids=torch.tensor([ids])).logits[0] for ids in prompts]

    return answer


def test_a_good_run_passes_gate_and_parity_and_goes_through_the_door(result: TrainingResult) -> None:
    admitted: list[Path] = []
    registration = register(result, answer=_engine(result), admit=lambda folder: admitted.append(folder) or "version")
    assert admitted == [result.adapter_folder]
    assert registration.admitted == "version"
    assert registration.parity.max_difference <= registration.parity.tolerance < 1e-3
    assert registration.parity.num_prompts == len(result.parity_prompts) > 0
    report = json.loads((result.run_folder / "parity.json").read_text("utf-8"))
    assert report["has_passed"]
    assert f"{report['max_difference']:.2e}" in (result.adapter_folder / "README.md").read_text("utf-8")
    assert load_result(result.run_folder, result.base) == result


@pytest.mark.parametrize("scale", [0.0, 0.9])
def test_an_engine_that_applies_the_adapter_wrongly_is_caught(result: TrainingResult, scale: float) -> None:
    _refused(result, ParityFailed, _engine(result, scale=scale))


def test_an_engine_that_answers_nonsense_is_caught(result: TrainingResult) -> None:
    right = _engine(result)
    _refused(result, ParityFailed, lambda prompts: [logits * float("nan") for logits in right(prompts)])
    _refused(result, ParityFailed, lambda prompts: [logits[:-1] for logits in right(prompts)])


def test_low_precision_is_held_to_the_distance_of_the_base(result: TrainingResult) -> None:
    answer = _engine(result, dtype=torch.bfloat16)
    _refused(result, ParityFailed, answer)
    found = register(result, answer=answer, admit=lambda folder: folder, engine_dtype=torch.bfloat16).parity
    assert found.engine_dtype == "bfloat16"
    assert found.max_difference > 1e-3


def test_an_adapter_that_is_not_better_is_refused(result: TrainingResult) -> None:
    evaluation = replace(result.evaluation, adapter_target=result.evaluation.base_target)
    _refused(replace(result, evaluation=evaluation), GateRefused, _engine(result))
    evaluation = replace(result.evaluation, adapter_target=float("nan"))
    _refused(replace(result, evaluation=evaluation), GateRefused, _engine(result))
    _refused(replace(result, is_finite=False), GateRefused, _engine(result))
    with pytest.raises(GateRefused, match="more than 100"):
        register(result, answer=_engine(result), admit=_never, min_gain=100)


def test_a_run_of_another_base_is_not_loaded(result: TrainingResult, tmp_path: Path) -> None:
    with pytest.raises(ResumeRefused, match="was trained on base"):
        load_result(result.run_folder, replace(result.base, fingerprint="0" * 64))
    with pytest.raises(ResumeRefused, match="no finished run"):
        load_result(tmp_path, result.base)


def _never(folder: Path) -> None:
    pytest.fail("registered although it had to be refused")


def _refused(result: TrainingResult, error: type[Exception], answer: Answer) -> None:
    with pytest.raises(error, match=r"registered|train again"):
        register(result, answer=answer, admit=_never)
