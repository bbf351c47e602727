"""Requests at the edge of what the surface allows: none of them may take the step loop, and so everybody, down."""

from __future__ import annotations

import pytest

from deltaserve.core import Binding, BindingPart
from deltaserve.errors import InvalidRequest
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


@pytest.mark.parametrize("scale", [1e39, -1e300])
def test_scales_that_float32_cannot_hold_are_refused(scale: float) -> None:
    rig = make_rig(contents={"v1": 1.0})
    huge = request("huge", [1] * 40, binding=Binding((BindingPart("v1", scale, scale),)))
    with pytest.raises(InvalidRequest, match="scale"):
        rig.engine.limits.check(huge)


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
