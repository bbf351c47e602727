"""Requests at the edge of what the surface allows: none of them may take the step loop, and so everybody, down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltaserve.admission import proof
from deltaserve.core import BASE_BINDING, Binding, BindingPart, Ensemble, Member
from deltaserve.engine.limits import MAX_SCALE
from deltaserve.engine.not_numbers import not_numbers
from deltaserve.errors import CompositionRefused, InvalidRequest
from deltatest.engine_fakes import VOCAB, make_rig, request

GREEDY = make_rig().run(request("greedy", [1, 2, 3], max_tokens=6))["greedy"]


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-42, 1e-38, 1e-30])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_temperatures_that_float32_cannot_hold_are_greedy(temperature: float, filters: dict[str, float]) -> None:
    cold = request("cold", [1, 2, 3], max_tokens=6, temperature=temperature, **filters)
    assert make_rig().run(cold)["cold"] == GREEDY


def test_stop_tokens_beyond_the_logits_forbid_nothing() -> None:
    """Tokenizers often know more tokens than the base has rows; the tokenizer's end of text may be one of them."""
    stops = request("stops", [1, 2, 3], max_tokens=6, min_tokens=3, eos=(VOCAB, VOCAB + 7))
    assert make_rig().run(stops)["stops"] == GREEDY


@pytest.mark.parametrize("scale", [1e39, -1e300, 1e30, -4097.0])
def test_scales_beyond_those_of_a_proof_are_refused(scale: float) -> None:
    rig = make_rig(contents={"v1": 1.0})
    huge = request("huge", [1] * 40, binding=Binding((BindingPart("v1", scale, scale),)))
    with pytest.raises(InvalidRequest, match=r"scale of adapters\[0\] .* between -4096 and 4096"):
        rig.engine.limits.check(huge)
    rig.engine.limits.check(replace(huge, binding=Binding((BindingPart("v1", MAX_SCALE, -MAX_SCALE),))))


def test_a_proof_asks_for_no_scale_that_is_refused() -> None:
    assert proof.MAX_SCALE <= MAX_SCALE


@pytest.mark.parametrize("penalty", [1e-300, 0.0099, -1.0])
def test_penalties_that_make_logits_overflow_are_refused(penalty: float) -> None:
    limits = make_rig().engine.limits
    with pytest.raises(InvalidRequest, match=r"repetition_penalty .* at least 0\.01"):
        limits.check(request("tiny", [1], repetition_penalty=penalty))
    limits.check(request("small", [1], repetition_penalty=0.01))


@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_a_prefix_at_another_strength_breaks_the_rule_of_compositions(scale: float) -> None:
    parts = (BindingPart("v1"), BindingPart("p", scale, 0.5, num_prefix_tokens=4))
    with pytest.raises(CompositionRefused, match=r"adapters\[1\] has strength .* of the kind prefix") as caught:
        make_rig().engine.limits.check(request("half", [1], binding=Binding(parts)))
    assert caught.value.param == "adapters[1].scale"
    assert [(reason.code, reason.where) for reason in caught.value.reasons] == [("strength_not_linear", "adapters[1]")]


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ((), 500),
        ((BindingPart("v1"),), 500),
        ((BindingPart("v1", 0.0, 0.0),), 500),
        ((BindingPart("v1", 2.0, 2.0),), 400),
        ((BindingPart("v1", 0.0, 1.0),), 400),
        ((BindingPart("v1"), BindingPart("v2")), 400),
    ],
)
def test_logits_that_are_no_numbers_are_the_fault_of_who_asked_for_more_than_was_proven(
    parts: tuple[BindingPart, ...], status: int
) -> None:
    error = not_numbers(request("bad", [1], binding=Binding(parts)))
    assert (error.status, error.error_code) == (status, "non_finite_logits")
    assert error.param == ("adapters" if status == 400 else None)
    together = Ensemble((Member(BASE_BINDING, 1.0), Member(Binding(parts), 1.0)))
    error = not_numbers(replace(request("bad", [1]), ensemble=together))
    assert (error.status, error.param) == (status, "ensemble.members" if status == 400 else None)


def test_scores_of_many_long_prompts_are_held_for_few_positions_at_once() -> None:
    rig = make_rig(max_num_batched_tokens=256, num_blocks=128)
    requests = [request(f"r{i}", [i + 1] * 100, max_tokens=1, prompt_logprobs=0) for i in range(6)]

    tokens = rig.run(*requests)
    assert all(len(row) == 1 for rows in tokens.values() for row in rows)
    assert rig.runner.max_step_tokens <= 64


def test_no_step_is_lost_when_the_only_running_sequence_must_be_computed_again() -> None:
    """An empty step makes the loop sleep for want of work, though there is some."""
    rig = make_rig(kv_regime=lambda length: int(length > 20))
    rig.engine.add(request("a", list(range(18)), max_tokens=10), 0.0)
    while rig.engine.open_ids:
        assert rig.engine.step().stats is not None
        rig.engine.check_integrity()
