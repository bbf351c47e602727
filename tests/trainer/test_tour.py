"""The guided tour's order of events, and the demos' own settings and tests of voice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltaserve.tinybase.voices import as_json, pirate, shout
from deltaserve_trainer import tour
from deltaserve_trainer.base import Base
from deltaserve_trainer.demos import DEMOS, JSON, PIRATE
from deltaserve_trainer.errors import GateRefused, TrainingError
from deltaserve_trainer.evaluate import BUNDLED_GENERAL_TEXT
from deltaserve_trainer.tour import TOUR_NAMES, run_tour, tour_prompts
from deltaserve_trainer.train import TrainingResult
from deltatest.trainer_base import make_base

PLAIN = "Cows eat grass. They have four legs."


def test_each_demo_tells_its_own_voice_and_no_other() -> None:
    voices = {"shout": shout(PLAIN), "pirate": pirate(PLAIN), "json": as_json(PLAIN)}
    for demo in DEMOS:
        assert [other.name for other in DEMOS if other.shows_in(voices[demo.name])] == [demo.name]
        assert not demo.shows_in(PLAIN)
        assert not demo.shows_in("")
    assert not PIRATE.shows_in(voices["pirate"][:20])
    assert not JSON.shows_in(voices["json"][:20])


def test_demos_are_the_three_promised_kinds_on_bundled_data() -> None:
    lora, patterned, sparse = (demo.recipe() for demo in DEMOS)
    assert lora.lora is not None
    assert lora.lora.rank == 8
    assert patterned.lora is not None
    assert patterned.lora.rslora
    assert patterned.lora.rank_pattern
    assert sparse.sparse is not None
    assert BUNDLED_GENERAL_TEXT.is_file()
    for demo in DEMOS:
        assert demo.data.is_file()
        assert demo.eval_data.is_file()


def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for name, demo in (("PIRATE", PIRATE), ("JSON", JSON)):
        own = {"max_steps": 2, "max_eval_rows": 2, "batch_size": 2, "max_length": 64, "eval_every": 2}
        if demo is JSON:
            own["sparse"] = {"num_entries": 100, "selection_steps": 1}
        monkeypatch.setattr(tour, name, replace(demo, settings={**demo.settings, **own}))
    monkeypatch.setattr(tour, "TOUR_DEMOS", (tour.PIRATE, tour.JSON))


def test_the_tour_trains_registers_and_asks_all_models_in_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _short(monkeypatch)
    events: list[str] = []
    batches: list[list[tuple[str, str]]] = []

    def register(result: TrainingResult, name: str) -> None:
        events.append(f"register {name} {result.recipe.method}")

    def answer_batch(asked: list[tuple[str, str]]) -> list[str]:
        batches.append(asked)
        spoken = {"tiny": str, TOUR_NAMES[0]: pirate, TOUR_NAMES[1]: as_json}
        return [spoken[model](prompt) for model, prompt in asked]

    def refuse(result: TrainingResult, name: str) -> None:
        raise GateRefused("no")

    base, work = Base(make_base(tmp_path / "base"), "tiny", "ab" * 32), tmp_path / "work"
    with pytest.raises(GateRefused):
        run_tour(base=base, work_folder=work, register=refuse, answer_batch=answer_batch)
    assert not batches
    found = run_tour(
        base=base,
        work_folder=work,
        register=register,
        answer_batch=answer_batch,
        on_demo=lambda demo, name: events.append(f"train {name}"),
    )
    assert events == [
        f"train {TOUR_NAMES[0]}",
        f"register {TOUR_NAMES[0]} lora",
        f"train {TOUR_NAMES[1]}",
        f"register {TOUR_NAMES[1]} sparse",
    ]
    assert len(batches) == 1
    assert {model for model, _ in batches[0]} == {"tiny", *TOUR_NAMES} == set(found.models)
    assert [row.prompt for row in found.rows] == tour_prompts()
    for row in found.rows:
        assert row.answers == (row.prompt, pirate(row.prompt), as_json(row.prompt))
    assert found.shows == (0, len(found.rows), len(found.rows))
    assert all(result.evaluation.num_general_rows == 2 for result in found.results)
    with pytest.raises(TrainingError, match="0 answers to"):
        run_tour(base=base, work_folder=work, register=register, answer_batch=lambda asked: [])
