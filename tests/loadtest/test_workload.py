from __future__ import annotations

import numpy as np
import pytest

from loadtest.workload import ClosedLoop, Workload, plan, popularity, prompts, streams, token_prompts


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    adapters = [f"a{i}" for i in range(5)]
    first = plan(Workload(rate=50, seconds=4, seed=3), "base", adapters)
    assert first == plan(Workload(rate=50, seconds=4, seed=3), "base", adapters)
    assert first != plan(Workload(rate=50, seconds=4, seed=4), "base", adapters)


def test_arrivals_are_poisson_of_the_asked_rate() -> None:
    planned = plan(Workload(rate=200, seconds=50, seed=1), "base", ["a"])
    gaps = np.diff([request.at_seconds for request in planned])
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # an exponential's deviation equals its mean


def test_a_fixed_count_arrives_at_the_times_of_a_poisson_law() -> None:
    for seed in range(5):
        workload = Workload(rate=200, seconds=20, seed=seed, is_count_fixed=True)
        times = [request.at_seconds for request in plan(workload, "base", ["a"])]
        assert len(times) == 4000
        assert times == sorted(times)
        assert times[0] >= 0
        assert times[-1] < 20
        gaps = np.diff(times)
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    assert len(plan(Workload(rate=0.1, seconds=1, is_count_fixed=True), "base", [])) == 1


def test_popularity_follows_the_named_law() -> None:
    zipf = popularity("zipf", 4, 1.0)
    assert zipf == pytest.approx(np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12))
    assert popularity("uniform", 4) == pytest.approx([0.25] * 4)
    planned = plan(Workload(rate=400, seconds=50, popularity="zipf", zipf_s=1.0, base_share=0.25), "base", list("abcd"))
    share = {name: sum(r.model == name for r in planned) / len(planned) for name in ("base", *"abcd")}
    assert share["base"] == pytest.approx(0.25, abs=0.02)
    for name, expected in zip("abcd", zipf, strict=True):
        assert share[name] == pytest.approx(0.75 * expected, abs=0.02)


def test_without_adapters_everything_goes_to_the_base() -> None:
    assert {request.model for request in plan(Workload(rate=20, seconds=5), "base", [])} == {"base"}


@pytest.mark.parametrize("count", [1, 16, 100])
def test_prompts_are_distinct(count: int) -> None:
    assert len(set(prompts(count))) == count


@pytest.mark.parametrize(
    "bad",
    [{"rate": 0}, {"seconds": -1}, {"popularity": "skewed"}, {"base_share": 1.5}, {"num_prompts": 0}],
)
def test_a_senseless_workload_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError):
        Workload(**{"rate": 1, "seconds": 1, **bad})


def test_distinct_takes_the_adapters_in_turn() -> None:
    planned = plan(Workload(rate=50, seconds=4, popularity="distinct", base_share=0.0), "base", list("abc"))
    assert [request.model for request in planned] == [list("abc")[i % 3] for i in range(len(planned))]


def test_token_prompts_are_distinct_of_one_length_and_another_seed_shares_none() -> None:
    made = token_prompts(500, 64, (6, 2048), seed=1)
    assert len(set(made)) == 500
    assert {len(prompt) for prompt in made} == {64}
    assert all(6 <= token < 2048 for prompt in made for token in prompt)
    assert made == token_prompts(500, 64, (6, 2048), seed=1)
    blocks = {prompt[:16] for prompt in made}
    assert not blocks & {prompt[:16] for prompt in token_prompts(500, 64, (6, 2048), seed=2)}
    with pytest.raises(ValueError, match="cannot be made"):
        token_prompts(9, 3, (0, 2), seed=0)


def test_a_closed_loop_gives_each_stream_its_adapter_and_no_prompt_twice() -> None:
    loop = ClosedLoop(concurrency=4, requests_per_stream=3, prompt_tokens=8, max_tokens=5)
    planned = streams(loop, ["a", "b"], (0, 1000))
    assert [[request.model for request in own] for own in planned] == [["a"] * 3, ["b"] * 3] * 2
    assert len({request.prompt for own in planned for request in own}) == 12
    assert sorted(request.index for own in planned for request in own) == list(range(12))
    assert planned == streams(loop, ["a", "b"], (0, 1000))


def test_more_adapters_than_streams_are_all_asked() -> None:
    models = [f"a{i}" for i in range(7)]
    planned = streams(ClosedLoop(concurrency=3, requests_per_stream=3), models, (0, 1000))
    assert {request.model for own in planned for request in own} == set(models)
    first_turn = [own[0].model for own in planned]
    assert len(set(first_turn)) == 3


def test_popularity_holds_in_a_closed_loop_too() -> None:
    loop = ClosedLoop(concurrency=8, requests_per_stream=250, popularity="zipf", zipf_s=1.0, prompt_tokens=4)
    asked = [request.model for own in streams(loop, list("abcd"), (0, 1000)) for request in own]
    for name, expected in zip("abcd", popularity("zipf", 4, 1.0), strict=True):
        assert asked.count(name) / len(asked) == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("bad", [{"concurrency": 0}, {"popularity": "skewed"}, {"max_tokens": 0}, {"prompt_tokens": 0}])
def test_a_senseless_closed_loop_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError):
        ClosedLoop(**{"concurrency": 1, **bad})
