"""Figures against numbers worked out by hand."""

from __future__ import annotations

import asyncio

import pytest

from loadtest.client import Answer, RunResult
from loadtest.derive import line, median_interval, over_rounds, ratio, shown, throughput
from loadtest.figures import Limits, latencies, percentiles, spread, summarize
from loadtest.steady import SteadyStreams
from loadtest.sweep import knee, rates_of, sweep
from loadtest.workload import PlannedRequest


def answer(*token_times: float, at: float = 0.0, tokens: int | None = None, error: str | None = None) -> Answer:
    made = Answer(PlannedRequest(0, at, "m", "p", 8), error=error)
    made.token_times = list(token_times)
    made.finished = token_times[-1] if token_times else at
    made.completion_tokens = len(token_times) if tokens is None else tokens
    return made


def run_of(*answers: Answer, wall: float = 2.0) -> RunResult:
    return RunResult(list(answers), wall, 0.01, 0.1)


def test_ttft_counts_from_the_schedule_and_tpot_from_the_tokens() -> None:
    one = answer(1.5, 1.6, 1.8, at=1.0)
    assert one.ttft_seconds == pytest.approx(0.5)
    assert one.itl_seconds == pytest.approx([0.1, 0.2])
    assert one.tpot_seconds == pytest.approx(0.15)
    merged = answer(1.0, 1.4, tokens=5)  # four tokens came in the second chunk
    assert merged.itl_seconds == pytest.approx([0.4])
    assert merged.tpot_seconds == pytest.approx(0.1)
    assert answer(1.0).tpot_seconds is None
    assert answer().ttft_seconds is None


def test_events_are_read_whatever_the_pieces_they_came_in() -> None:
    one = answer()
    one.raw = [
        (1.0, b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choi'),
        (2.0, b'ces": [{"text": "b"}]}\r\n\r\n: a comment\n\ndata: {"choices": [{"text": ""}]}\n\n'),
        (3.0, b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n'),
    ]
    one.settle()
    assert (one.text, one.token_times, one.completion_tokens, one.error) == ("ab", [1.0, 2.0], 2, None)


@pytest.mark.parametrize(
    ("received", "told"),
    [
        (b'data: {"choices": [{"text": "a"}]}\n\n', "without [DONE]"),
        (b'data: {"error": {"message": "engine failed"}}\n\n', "engine failed"),
        (b"data: {\n\ndata: [DONE]\n\n", "JSONDecodeError"),
    ],
)
def test_a_stream_that_ends_badly_is_a_failure(received: bytes, told: str) -> None:
    one = answer()
    one.raw = [(1.0, received)]
    one.settle()
    assert told in str(one.error)
    refused = answer(error="429 queue full")
    refused.settle()
    assert refused.error == "429 queue full"


def test_gaps_of_steady_streams_belong_to_the_window_in_which_they_end() -> None:
    def stream(sent: float, *times: float) -> Answer:
        made = answer(*times, error="cut")
        made.sent, made.raw = sent, [(at, b'data: {"choices": [{"text": "a"}]}\n\n') for at in times]
        made.token_times = []
        return made

    found = SteadyStreams(0.0, [stream(0.0, 1.0, 1.5, 2.5, 2.6), stream(0.0, 1.0, 1.2), stream(1.3, 2.0, 2.2)])
    found.settle()
    # The third request began at 1.3 and prefilled until 2.0: the gaps to 1.5 and 2.5 of the others overlap that.
    assert found.over([(0.0, 2.0)])["latency"]["itl_seconds"]["count"] == 1
    late = found.over([(2.0, 2.15), (2.15, 3.0)])
    assert late["window_seconds"] == pytest.approx(1.0)
    assert late["latency"]["itl_seconds"]["max"] == pytest.approx(0.2)
    assert late["latency"]["itl_seconds"]["count"] == 2
    assert found.over([(2.0, 2.15)])["latency"]["itl_seconds"] == {"count": 0}


def test_percentiles_of_nothing_and_of_something() -> None:
    assert percentiles([]) == {"count": 0}
    found = percentiles([float(i) for i in range(101)])
    assert (found["p50"], found["p99"], found["mean"], found["max"], found["count"]) == (50, 99, 50, 100, 101)


def test_failed_requests_have_no_latency_and_no_tokens() -> None:
    found = summarize(run_of(answer(1.0, 1.1), answer(9.0, 9.9, error="429 full")))
    assert (found["num_requests"], found["num_succeeded"], found["completion_tokens"]) == (2, 1, 2)
    assert found["failures"] == {"429 full": 1}
    assert found["tokens_per_second"] == 1.0
    assert found["latency"]["ttft_seconds"]["max"] == 1.0
    assert latencies([answer(9.0, error="x")])["e2e_seconds"] == {"count": 0}


def test_goodput_counts_requests_that_keep_both_limits() -> None:
    limits = Limits(ttft_seconds=1.0, itl_seconds=0.1)
    answers = [
        answer(0.5, 0.55),  # good
        answer(1.5, 1.55),  # too late a first token
        answer(0.5, 0.9),  # too slow after it
        answer(0.2),  # one token: no gap to judge
        answer(0.1, 0.12, error="cut"),  # failed
    ]
    found = summarize(run_of(*answers), limits)["goodput"]
    assert found["share"] == pytest.approx(2 / 5)
    assert found["requests_per_second"] == pytest.approx(2 / 2.0)
    assert found["tokens_per_second"] == pytest.approx(3 / 2.0)
    # Answers are waited for after the last arrival; that is no time in which more could have been served.
    over_arrivals = summarize(run_of(*answers), limits, offered_seconds=1.0)["goodput"]
    assert over_arrivals["requests_per_second"] == pytest.approx(2.0)
    assert over_arrivals["share"] == found["share"]
    assert Limits().are_kept_by(answers[1])
    assert not Limits().are_kept_by(answers[4])


def test_spread_and_how_it_is_shown() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": 3}
    assert shown(spread([0.0123, 0.01, 0.02]), scale=1000, digits=1) == "12.3 [10.0–20.0]"
    assert shown(spread([1234.0])) == "1,234"
    assert shown(None) == "–"


def test_ratios_are_taken_inside_a_round() -> None:
    def figures(tokens: float, failed: int = 0) -> dict:
        return {"tokens_per_second": tokens, "num_requests": 4, "num_succeeded": 4 - failed}

    ours, theirs = (
        [figures(100), figures(400), None, figures(100)],
        [figures(50), figures(200), figures(9), figures(9, 1)],
    )
    # Twice as fast in each round, though the machine was four times as fast in one of them; what failed is left out.
    assert ratio(ours, theirs, throughput) == {"median": 2.0, "min": 2.0, "max": 2.0, "rounds": 2}
    assert over_rounds(theirs, throughput) == spread([50, 200, 9])
    assert ratio([None], [figures(1)], throughput) is None


def test_the_median_lies_between_order_statistics() -> None:
    # Of 12 values the third on each side: 2 * (1 + 12 + 66) / 4096 is below 5 %, with the fourth it is above.
    assert median_interval([float(i) for i in range(12, 0, -1)]) == (3.0, 10.0)
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None  # all on one side has a chance of 1 in 16
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (1.0, 6.0)
    assert median_interval([]) is None


def test_a_line_and_how_much_it_explains() -> None:
    straight = line([0.0, 1.0, 2.0], [1.0, 3.0, 5.0])
    assert straight is not None
    assert (straight.at_zero, straight.slope, straight.r_squared) == pytest.approx((1.0, 2.0, 1.0))
    assert straight.at(10) == pytest.approx(21.0)
    bent = line([0.0, 1.0, 2.0], [0.0, 3.0, 0.0])
    assert bent is not None
    assert (bent.slope, bent.r_squared) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert line([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert line([1.0, 2.0], [1.0, 2.0]) is None


def point(rate: float, share: float) -> dict:
    return {"rate": rate, "goodput": {"share": share}}


def test_the_knee_is_the_last_rate_before_the_first_bad_one() -> None:
    assert knee([point(1, 1.0), point(2, 0.95), point(4, 0.3)], 0.9) == (2, 4)
    assert knee([point(1, 0.2)], 0.9) == (None, 1)
    assert knee([point(1, 1.0)], 0.9) == (1, None)
    assert knee([point(1, 1.0), point(2, 0.5), point(4, 0.99)], 0.9) == (1, 2)  # a lucky high rate is no knee
    assert knee([point(2, 0.6), point(2, 1.0)], 0.9) == (None, 2)  # the better of two rounds is not the median
    assert knee([point(2, 0.2), point(2, 1.0), point(2, 0.95)], 0.9) == (2, None)  # the median of three rounds


def test_the_sweep_narrows_down_to_the_true_knee() -> None:
    asked: list[float] = []

    async def measure(rate: float, number: int) -> dict:
        asked.append(rate)
        return {**point(rate, 1.0 if rate <= 5.3 else 0.0), "round": number}

    points = asyncio.run(sweep(measure, [1, 2, 4, 8], rounds=2, share=0.9, refine=3, seed=0))
    assert asked[:4] == [1, 2, 4, 8]
    assert sorted(asked[4:8]) == [1, 2, 4, 8]
    good, bad = knee(points, 0.9)
    assert good is not None
    assert bad is not None
    assert good <= 5.3 < bad
    assert bad - good == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("text", ["", "0,1", "-2", "nan", "inf", "two"])
def test_rates_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        rates_of(text)
    assert rates_of("4, 1,4") == [1, 4]
