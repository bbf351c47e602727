"""Sweep, churn, capacity and offline run against a real deltaserve on a tiny fixture: that they run, never how fast."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from aiohttp import web

from deltatest.fake_peer import SEEN, application
from deltatest.fixture_of_load import TINY
from loadtest import capacity, churn, offline, sweep
from loadtest.__main__ import main
from loadtest.churn import adapter_bodies
from loadtest.client import Target, open_session, run_closed
from loadtest.peers.settings import peers
from loadtest.scrape import total
from loadtest.small import write
from loadtest.tables import render
from loadtest.workload import ClosedLoop, streams

SHORT = ["--prompt-tokens", "8", "--max-tokens", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("commands")
    write(place / "fixture", adapters=4, ranks=[2, 4], shape=TINY)
    return place


def record_of(out: Path) -> dict:
    return json.loads((out / "record.json").read_text())


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_adapters_that_come_and_go_are_counted_by_the_server(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--fixture", str(folder / "fixture"), "--work", str(folder / "churn"), "--out", str(folder / "out-churn")]
    words += ["--steady", "2", "--seconds", "1.5", "--rounds", "1", "--background-rate", "8", *SHORT]
    words += ["--server-option=--adapter-slots", "--server-option=4", "--upload-rank", "2"]
    assert churn.main(words) == 0, capsys.readouterr().err
    made = record_of(folder / "out-churn")
    results = made["rounds"][0]["results"]
    assert set(results) == set(churn.PHASES)
    for name, figures in results.items():
        assert figures["num_succeeded"] == figures["num_requests"] > 0, name
        assert not figures["background"]["failures"], name
        assert figures["latency"]["itl_seconds"]["count"] > 0
    assert results["quiet"]["background"]["operations"] == {}
    assert results["resident"]["background"]["operations"]["request"] > 3
    # Five other adapters, four slots, two of them held by the steady streams: each request loads and evicts.
    counted = results["load"]["counted"]
    asked = results["load"]["background"]["operations"]["request"]
    assert counted["adapter_loads_total"] >= asked - 4 > 0
    assert counted["adapter_evictions_total"] > 0
    assert results["resident"]["counted"]["adapter_loads_total"] <= 4
    uploads = results["upload"]["background"]["operations"]
    assert set(uploads) == {"register", "replace", "delete"}
    assert results["upload"]["counted"]["adapter_uploads_total"] == uploads["register"] + uploads["replace"]
    assert "| register, replace, delete over HTTP |" in render(made)
    assert is_png(folder / "out-churn" / "itl_under_churn.png")


def test_capacity_compares_every_point_with_the_base_of_its_round(folder: Path) -> None:
    words = [
        "--fixture",
        str(folder / "fixture"),
        "--work",
        str(folder / "capacity"),
        "--counts",
        "1,4",
        "--rounds",
        "2",
    ]
    words += ["--ranks", "2,4", "--concurrency", "2", "--requests-per-stream", "1", "--out", str(folder / "out-cap")]
    assert capacity.main([*words, *SHORT]) == 0
    made = record_of(folder / "out-cap")
    assert [point["name"] for point in made["points"]] == [
        "base", "1 adapters", "4 adapters", "rank 2", "rank 4", "mixed ranks",
    ]  # fmt: skip
    sizes = {point["name"]: point["adapter_bytes"] for point in made["points"]}
    assert 0 < sizes["rank 2"] < sizes["mixed ranks"] < sizes["rank 4"]
    for entry in made["rounds"]:
        assert sorted(entry["order"]) == sorted(sizes)
        # Four adapters on two streams take two turns, so that each of them is asked.
        assert entry["results"]["4 adapters"]["num_requests"] == 4
        assert all(figures["num_succeeded"] == figures["num_requests"] for figures in entry["results"].values())
    assert "| 4 adapters | 2 |" in render(made)
    assert is_png(folder / "out-cap" / "throughput_against_adapters.png")
    assert is_png(folder / "out-cap" / "overhead_against_rank.png")


def test_the_engine_alone_does_the_same_work_as_over_http(folder: Path) -> None:
    words = [str(folder / "fixture"), "--work", str(folder / "offline"), "--out", str(folder / "out-offline")]
    assert offline.main([*words, "--concurrency", "3", "--num-adapters", "3", "--rounds", "1", *SHORT]) == 0
    made = record_of(folder / "out-offline")
    results = made["rounds"][0]["results"]
    assert results["offline"]["tokens"] == results["http"]["tokens"] == 3 * 2 * 4
    assert made["parameters"]["num_adapters"] == 3
    assert "3 adapters." in render(made)


async def served(app: web.Application, use: Callable[[str], object]) -> object:
    """Runs blocking ``use(url)`` beside the served application."""
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        return await asyncio.to_thread(use, f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


def test_a_sweep_over_a_running_server(tmp_path: Path) -> None:
    app = application(["a", "b"], fail_every=7)
    words = ["--rates", "5,20", "--seconds", "1", "--rounds", "2", "--refine", "0", "--popularity", "distinct", *SHORT]
    words += ["--ttft-limit", "5", "--itl-limit", "5", "--share", "0.5", "--out", str(tmp_path)]
    assert asyncio.run(served(app, lambda url: sweep.main(["--url", url, *words]))) in (0, 3)
    made = record_of(tmp_path)
    assert [(point["rate"], point["round"]) for point in made["points"]] == [(5, 0), (5, 1), (20, 0), (20, 1)]
    assert made["knee"] == {"rate": 20, "first_bad_rate": None}
    assert any(point["failures"] for point in made["points"])
    for point in made["points"]:
        assert point["goodput"]["share"] == point["num_succeeded"] / point["num_requests"]
    assert {body["model"] for body in app[SEEN]} == {"small", "a", "b"}
    assert all(len(body["prompt"]) == 8 for body in app[SEEN])
    assert is_png(tmp_path / "latency_against_rate.png")
    assert "**Knee (at least 50 % good): 20 requests/s.**" in render(made)


def test_a_closed_loop_keeps_its_concurrency_and_stops_at_its_time() -> None:
    app = application(["a"], token_seconds=0.02)
    planned = streams(ClosedLoop(3, 50, prompt_tokens=4, max_tokens=5), ["a"], (0, 1000))

    async def go(url: str) -> None:
        async with open_session() as session:
            result = await run_closed(session, Target(url, "small", ("a",)), planned, seconds=0.5)
        assert all(answer.is_ok for answer in result.answers)
        assert 3 <= len(result.answers) <= 3 * 6  # 0.1 s a request at least
        by_stream: dict[int, list] = {}
        for answer in result.answers:
            by_stream.setdefault(answer.request.index // 50, []).append(answer)
        assert len(by_stream) == 3
        for own in by_stream.values():
            for earlier, later in pairwise(own):
                assert later.sent >= earlier.finished
                assert later.request.at_seconds == pytest.approx(later.sent, abs=0.05)

    asyncio.run(served(app, lambda url: asyncio.run(go(url))))


def test_bodies_of_churn_are_all_different_and_all_valid() -> None:
    from safetensors.torch import load

    made = adapter_bodies(TINY, 2, seed=1, count=300)
    assert len({body["adapter_model.safetensors"] for body in made}) == 300
    for body in (made[0], made[255], made[299]):
        tensors = load(body["adapter_model.safetensors"])
        assert all(tensor.isfinite().all() and tensor.abs().max() < 10 for tensor in tensors.values())


def test_a_server_that_cannot_be_had_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--fixture", str(folder / "fixture"), "--server", "vllm-cpu"],
        ["--fixture", str(folder / "fixture"), "--server", "nobody"],
        ["--fixture", str(folder / "nothing")],
        [],
        ["--url", "http://127.0.0.1:9"],
        ["--url", "http://example.com"],
    ):
        assert capacity.main([*words, "--out", str(folder / "none")]) == 2
        assert capsys.readouterr().err.startswith("loadtest: ")


def test_metrics_are_summed_over_the_labels_asked_for() -> None:
    samples = {'deltaserve_x{level="device"}': 2.0, 'deltaserve_x{level="host"}': 3.0, "deltaserve_x_more": 9.0}
    assert total(samples, "x") == 5.0
    assert total(samples, "x", 'level="device"') == 2.0
    assert total({}, "x") == 0.0


def test_an_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly"]) == 2
    assert "sweep" in capsys.readouterr().err
    assert peers({}).keys() >= {"deltaserve", "vllm-cpu", "vllm-cpu-base", "llama-server", "peft"}


def test_every_command_has_help() -> None:
    from loadtest.__main__ import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
