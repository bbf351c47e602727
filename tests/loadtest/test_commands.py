"""Commands run against a real deltaserve on a tiny fixture: that they do what they say, never how fast."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web

from deltatest.fake_peer import SEEN, application
from deltatest.fixture_of_load import TINY
from loadtest import capacity, churn, offline, register, registered, sweep
from loadtest.__main__ import main
from loadtest.churn import adapter_bodies
from loadtest.client import Target, open_session, run_closed
from loadtest.peers.settings import peers
from loadtest.scrape import total
from loadtest.small import write
from loadtest.tables import render
from loadtest.target_choice import OpenTarget
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
    words += ["--steady", "2", "--seconds", "1.5", "--rounds", "2", "--background-rate", "8", *SHORT]
    words += ["--server-option=--adapter-slots", "--server-option=4", "--upload-rank", "2", "--max-tokens", "64"]
    words += ["--server-option=--adapter-host-bytes", "--server-option=16KB"]
    assert churn.main(words) == 0, capsys.readouterr().err
    made = record_of(folder / "out-churn")
    assert not made["steady"]["failures"]
    assert made["steady"]["num_requests"] > 2
    for entry in made["rounds"]:
        assert set(entry["results"]) == set(churn.PHASES)
        for figures in entry["results"].values():
            assert not figures["background"]["failures"]
            assert figures["latency"]["itl_seconds"]["count"] > 0
            assert figures["window_seconds"] == pytest.approx(1.5, abs=0.5)
    for phase, whole in made["whole"].items():
        counts = [entry["results"][phase]["latency"]["itl_seconds"]["count"] for entry in made["rounds"]]
        assert whole["latency"]["itl_seconds"]["count"] == sum(counts)
    results = made["rounds"][0]["results"]
    assert results["quiet"]["background"]["operations"] == {}
    assert results["resident"]["background"]["operations"]["request"] > 3
    # Five other adapters, four slots, two of them held by the streams, room for one on the host: each request loads
    # one from disk and evicts another, but for what the phase before left.
    counted, asked = results["load"]["counted"], results["load"]["background"]["operations"]["request"]
    assert counted["loads"] >= asked - 4 > 0
    assert asked - 4 <= counted["evictions"] <= asked + 2
    assert results["resident"]["counted"]["loads"] <= 1
    # As often as the window has time for; a name that is begun goes through all three, however late it gets.
    uploads = results["upload"]["background"]["operations"]
    turns = uploads["register"]
    assert turns > 0
    assert uploads == {"register": turns, "replace": turns, "delete": turns}
    assert results["upload"]["counted"]["uploads"] == 2 * turns
    assert made["parameters"]["other_adapters"] == 5
    assert "| register, replace, delete over HTTP |" in render(made)
    assert is_png(folder / "out-churn" / "itl_under_churn.png")


def test_registered_adapters_stand_beside_two_servers_without(folder: Path) -> None:
    words = [str(folder / "fixture"), "--work", str(folder / "registered"), "--out", str(folder / "out-registered")]
    words += ["--rounds", "2", "--starts", "1", "--concurrency", "2", "--num-adapters", "3", *SHORT]
    assert registered.main(words) == 0
    made = record_of(folder / "out-registered")
    assert made["parameters"]["num_resident"] == made["parameters"]["num_adapters"] == 3
    assert len(made["rounds"]) == 2
    for entry in made["rounds"]:
        assert set(entry["results"]) == {"adapters", "none", "none again"}
        assert {figures["completion_tokens"] for figures in entry["results"].values()} == {2 * 2 * 4}
    assert "| 3, 3 of them resident |" in render(made)
    assert is_png(folder / "out-registered" / "ratios.png")


def test_the_store_is_filled_before_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(folder / "fixture"), "--work", str(folder / "filled")]
    assert register.main([*words, "--num-adapters", "2"]) == 0
    assert register.main(words) == 0
    said = capsys.readouterr().out
    assert "holds 2 adapters" in said
    assert "holds 8 adapters" in said
    log = (folder / "filled" / "deltaserve.log").read_text()
    assert sum('"POST"' in line for line in log.splitlines()) == 6  # the two were there already


def test_capacity_compares_every_point_with_the_base_of_its_round(folder: Path) -> None:
    words = ["--fixture", str(folder / "fixture"), "--work", str(folder / "capacity"), "--out", str(folder / "out-cap")]
    words += ["--counts", "1,4", "--laws", "distinct,zipf", "--ranks", "4,2", "--rounds", "2", "--concurrency", "2"]
    assert capacity.main([*words, "--requests-per-stream", "1", *SHORT]) == 0
    made = record_of(folder / "out-cap")
    assert [point["name"] for point in made["points"]] == [
        "base", "1 adapters", "4 adapters", "4 adapters, zipf", "rank 2", "rank 4", "all ranks",
    ]  # fmt: skip
    sizes = {point["name"]: point["adapter_bytes"] for point in made["points"]}
    assert 0 < sizes["rank 2"] < sizes["all ranks"] < sizes["rank 4"]
    assert {point["name"]: point["rank_sum"] for point in made["points"] if point["axis"] == "rank"} == {
        "rank 2": 4, "rank 4": 8, "all ranks": 6,
    }  # fmt: skip
    for entry in made["rounds"]:
        assert sorted(entry["order"]) == sorted(sizes)
        assert entry["results"]["4 adapters"]["num_asked"] == 2
        assert all(figures["num_succeeded"] == figures["num_requests"] == 2 for figures in entry["results"].values())
    assert "| 4 | " in render(made)
    assert is_png(folder / "out-cap" / "throughput_against_adapters.png")
    assert is_png(folder / "out-cap" / "overhead_against_rank.png")


def test_a_round_goes_on_with_the_adapters_where_the_last_one_ended() -> None:
    app = application([f"a{i}" for i in range(7)])
    given = capacity.arguments().parse_args(["--concurrency", "2", "--requests-per-stream", "1", *SHORT])
    point = capacity.Point("7 adapters", tuple(f"a{i}" for i in range(7)), "adapters")

    async def go(url: str) -> None:
        async with open_session() as session:
            opened = OpenTarget(session, Target(url, "small", point.models), (0, 1000))
            for number in (-1, 0, 1, 2):
                await capacity.measure(given, opened, point, number, number + 1)

    asyncio.run(served(app, lambda url: asyncio.run(go(url))))
    asked = [body["model"] for body in app[SEEN]]
    assert set(asked[:8]) == set(point.models)  # the warm-up asks each once
    assert [sorted(asked[i : i + 2]) for i in (8, 10, 12)] == [["a0", "a1"], ["a2", "a3"], ["a4", "a5"]]


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
        assert point["num_requests"] == point["rate"]  # of one second
        assert point["goodput"]["requests_per_second"] == point["num_succeeded"]
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


class AfterOperations(asyncio.Event):
    """A stop that has come when it was asked for the n-th time: once before each operation."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize(("count", "turns"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2)])
def test_a_name_is_registered_replaced_and_deleted_whenever_the_stop_comes(
    count: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, str]] = []

    async def upload(session: object, url: str, name: str, body: dict[str, bytes]) -> None:
        seen.append(("upload", name, body["number"].decode()))

    async def delete(session: object, url: str, name: str) -> None:
        seen.append(("delete", name, ""))

    monkeypatch.setattr(churn, "upload", upload)
    monkeypatch.setattr(churn, "delete", delete)
    opened = SimpleNamespace(target=SimpleNamespace(url="http://nowhere"), session=None)
    bodies = [{"number": str(number).encode()} for number in range(9)]
    stop = AfterOperations(count)
    found = asyncio.run(churn.register_replace_delete(opened, bodies, 1e9, "p", stop))
    wanted = [
        call
        for turn in range(turns)
        for call in (
            ("upload", f"p-{turn}", str(2 * turn)),
            ("upload", f"p-{turn}", str(2 * turn + 1)),
            ("delete", f"p-{turn}", ""),
        )
    ]
    assert seen == wanted
    assert found.done == {kind: turns for kind in ("register", "replace", "delete") if turns}
    assert not found.failures
