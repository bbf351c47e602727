"""Mixing rows of logits: exactness, order, and tokens that cannot be."""

from __future__ import annotations

import math

import pytest
import torch

from deltaserve.core import BASE_BINDING, Ensemble, Member, Mix
from deltaserve.engine.mixing import mix


def models(*weights: float, how: Mix = Mix.LOGITS) -> Ensemble:
    return Ensemble(tuple(Member(BASE_BINDING, weight) for weight in weights), how)


def rows(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(*shape, generator=generator) * 9 for _ in range(count)]


def test_weight_1_keeps_every_bit_and_the_rows_stay_as_they_are() -> None:
    (row,) = rows(1, 5, 4001)
    before = row.clone()
    assert torch.equal(mix([row], models(1.0)), row)
    assert torch.equal(row, before)
    for count in (2, 3, 7):
        for how in Mix:
            assert torch.equal(mix([row] * count, models(*[1 / count] * count, how=how)), row)


def test_a_mean_of_logits_is_one_of_log_probabilities() -> None:
    each = rows(3, 211)
    weights = (0.5, 0.3, 0.2)
    mixed = mix(each, models(*weights)).log_softmax(-1)
    mean = sum(weight * row.log_softmax(-1) for weight, row in zip(weights, each, strict=True))
    assert isinstance(mean, torch.Tensor)
    assert torch.allclose(mixed, mean.log_softmax(-1), atol=1e-5)


def test_a_mean_of_probabilities_takes_weights_of_any_sum() -> None:
    each = rows(3, 4, 211)
    for weights in ((0.5, 0.3, 0.2), (5.0, 3.0, 2.0)):
        mixed = mix(each, models(*weights, how=Mix.PROBABILITIES)).softmax(-1)
        mean = sum(weight / sum(weights) * row.softmax(-1) for weight, row in zip(weights, each, strict=True))
        assert isinstance(mean, torch.Tensor)
        assert torch.allclose(mixed, mean, atol=1e-6)


@pytest.mark.parametrize("weights", [(5e-324, 1000.0), (5e-324, 1e-300), (5e-324, 5e-324)])
def test_a_weight_whose_share_no_number_holds_counts_for_next_to_nothing(weights: tuple[float, float]) -> None:
    each = rows(2, 3, 211)
    mixed = mix(each, models(*weights, how=Mix.PROBABILITIES)).softmax(-1)
    share = weights[0] / sum(weights)
    mean = share * each[0].softmax(-1) + (1 - share) * each[1].softmax(-1)
    assert torch.allclose(mixed, mean, atol=1e-6)


@pytest.mark.parametrize("how", Mix)
def test_what_members_cannot_say(how: Mix) -> None:
    """Of logits the mean is a product of probabilities: one member that rules a token out is enough."""
    one, other = rows(2, 7)
    one[2] = other[2] = other[3] = -math.inf
    mixed = mix([one, other], models(0.5, 0.5, how=how))
    assert mixed[2] == -math.inf
    assert (mixed[3] == -math.inf) == (how is Mix.LOGITS)
    assert mixed[[0, 1, 4, 5, 6]].isfinite().all()


def test_a_token_that_is_impossible_stays_so_where_a_weight_is_negative() -> None:
    one, other = rows(2, 7)
    one[2] = other[2] = other[3] = -math.inf
    mixed = mix([one, other], models(1.5, -0.5))
    assert (mixed == -math.inf).tolist() == [False, False, True, True, False, False, False]
    assert not mixed.isnan().any()


def test_what_is_no_number_stays_none() -> None:
    one, other = rows(2, 7)
    other[4] = math.nan
    for how in Mix:
        assert mix([one, other], models(0.5, 0.5, how=how)).isnan().any()
