from __future__ import annotations

import numpy as np
import pytest

from loadtest.workload import Workload, plan, popularity, prompts


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


def test_popularity_follows_the_named_law() -> None:
    zipf = popularity(Workload(rate=1, seconds=1, popularity="zipf", zipf_s=1.0), 4)
    assert zipf == pytest.approx(np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12))
    assert popularity(Workload(rate=1, seconds=1), 4) == pytest.approx([0.25] * 4)
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
