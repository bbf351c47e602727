"""How near two bases are: the line between them, and the hump on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaserve_store.spec import BaseSpec, LinearSpec, NormSpec
from deltaserve_trainer.base import load_model
from deltaserve_trainer.errors import RebaseRefused
from deltaserve_trainer.loss import mean_loss
from deltaserve_trainer.merging.low_rank import Factors
from deltaserve_trainer.merging.update import LinearUpdate, Update
from deltaserve_trainer.rebase import STEPS, Relation, check_fit, relation
from deltaserve_trainer.scoring import read_rows
from deltatest.trainer_base import make_base, write_pairs


def test_a_barrier_is_what_rises_above_the_straight_line() -> None:
    assert Relation(1.0, (3.0, 2.75, 2.5, 2.25, 2.0)).barrier == pytest.approx(0.0)
    assert Relation(1.0, (3.0, 2.0, 1.5, 1.5, 2.0)).barrier == 0.0
    hump = Relation(1.0, (3.0, 3.0, 4.0, 3.0, 2.0))
    assert hump.barrier == pytest.approx(1.5)
    assert not hump.is_near
    assert Relation(0.9, (3.0, 2.8, 2.55, 2.3, 2.0)).is_near
    assert not Relation(0.5, (3.0, 2.8, 2.6, 2.3, 2.0)).is_near


def test_the_line_is_that_of_models_in_between(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    for name, seed in (("one", 0), ("other", 4)):
        make_base(tmp_path / name, seed=seed)
    rows = read_rows(write_pairs(tmp_path / "p.jsonl", 3), tmp_path / "one", max_rows=3, max_length=64)
    found = relation(load_model(tmp_path / "one"), load_model(tmp_path / "other"), rows, pad_token_id=0)
    assert abs(found.similarity) < 0.1
    for step, loss in zip(STEPS, found.line, strict=True):
        between = load_model(tmp_path / "one")
        for parameter, goal in zip(between.parameters(), load_model(tmp_path / "other").parameters(), strict=True):
            parameter.data = (1 - step) * parameter.data + step * goal.data
        assert loss == pytest.approx(
            mean_loss(between, rows, batch_size=8, pad_token_id=0, precision="float32"), abs=1e-4
        )
    one, foreign = load_model(tmp_path / "one"), load_model(make_base(tmp_path / "gpt2", architecture="gpt2"))
    with pytest.raises(RebaseRefused, match="different parameters"):
        relation(one, foreign, rows, pad_token_id=0)


def test_what_has_no_place_is_named() -> None:
    spec = BaseSpec("ab" * 32, ("x",), "llama", {"a": LinearSpec("a", 4, 6)}, 10, 1, 6, norms={"n": NormSpec("n", 6)})
    factors = Factors(torch.ones(1, 6), torch.ones(4, 1))
    check_fit(Update({"a": LinearUpdate((4, 6), factors)}, {"n": {"gain": torch.ones(6)}}), spec)
    with pytest.raises(RebaseRefused, match=r"a is \[4, 6\], the adapter's is \[6, 4\]; b is not there"):
        check_fit(Update({"a": LinearUpdate((6, 4)), "b": LinearUpdate((1, 1))}), spec)
    for norms in ({"m": {"gain": torch.ones(6)}}, {"n": {"gain": torch.ones(5)}}, {"n": {"shift": torch.ones(6)}}):
        with pytest.raises(RebaseRefused, match="the norm"):
            check_fit(Update({}, norms), spec)
