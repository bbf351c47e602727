"""A short fine-tune of the embedded base: forms of the same size, by how far their answers are from the fine-tune's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltaserve.tinybase import CHECKPOINT, DEMO_DATA
from deltaserve_trainer.base import Base, load_model, spec_of
from deltaserve_trainer.extraction.activations import Measure, moments_of
from deltaserve_trainer.extraction.difference import Difference, difference
from deltaserve_trainer.extraction.pieces import dense_of, pieces_of
from deltaserve_trainer.extraction.plan import FORMS, Form, best_plan
from deltaserve_trainer.extraction.worth import Costs, worth_of
from deltaserve_trainer.scoring import divergence, model_logits, read_rows

STEPS, BUDGET = 8, 10_000
PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def rows(name: str, count: int) -> list[list[int]]:
    path: Path = DEMO_DATA / name
    return [list(row.input_ids) for row in read_rows(path, CHECKPOINT, max_rows=count, max_length=48)]


@pytest.fixture(scope="module")
def tuned() -> tuple[Any, Any, Difference]:
    """Base, fine-tune and their difference: some linears of one layer, trained on the pirate's answers."""
    torch.set_num_threads(1)
    base = load_model(CHECKPOINT)
    model: Any = copy.deepcopy(base)
    trained = [model.model.layers[2].get_submodule(part).weight for part in PARTS]
    for weight in trained:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    texts = rows("pirate.jsonl", 4 * STEPS)
    for step in range(STEPS):
        for ids in texts[4 * step : 4 * step + 4]:
            tokens = torch.tensor([ids])
            (model(input_ids=tokens, labels=tokens).loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    return base, model, difference(base, model, spec_of(base, Base(CHECKPOINT, "tinybase", "ab" * 32)))


def divergences(
    tuned: tuple[nn.Module, nn.Module, Difference], measures: Mapping[str, Measure], *wanted: tuple[Form, ...]
) -> list[float]:
    base, model, found = tuned
    held = rows("pirate.eval.jsonl", 6)
    meant = model_logits(model, held)
    worths = {name: worth_of(name, found.matrix(name), measures[name], Costs(torch.float16)) for name in measures}
    plans = [best_plan(worths, BUDGET, forms=forms) for forms in wanted]
    told = []
    for chosen, pieces in zip(plans, pieces_of(plans, found.matrix, measures.__getitem__, torch.float16), strict=True):
        assert chosen.num_bytes <= BUDGET
        served = copy.deepcopy(base)
        for name, piece in pieces.items():
            served.get_submodule(name).get_parameter("weight").data += dense_of(piece, worths[name].shape)
        told.append(divergence(meant, model_logits(served, held)))
    return told


def test_mixed_precision_is_nearer_than_low_rank_of_its_size(tuned: tuple[Any, Any, Difference]) -> None:
    base, model, found = tuned
    held = rows("pirate.eval.jsonl", 6)
    nothing = divergence(model_logits(model, held), model_logits(base, held))
    linears = {name: found.linears[name][0] for name in found.changed()}
    plain = {name: Measure.plain(found.matrix(name).shape[1]) for name in linears}
    low_rank, mixed, all_forms = divergences(tuned, plain, ("low rank",), ("mixed precision",), FORMS)
    assert mixed < 0.7 * low_rank < low_rank < nothing
    assert all_forms <= 1.05 * mixed
    after = {name: found.linears[name][1] for name in linears}
    moments = moments_of([(base, linears), (model, after)], rows("pirate.jsonl", 24))
    (counted,) = divergences(tuned, {name: moments[name].measure() for name in linears}, ("mixed precision",))
    assert counted < 1.1 * mixed
