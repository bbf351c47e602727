"""Side by side, with servers whose speed and mistakes are scripted: the record must tell them apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltatest.fixture_of_load import TINY, FakePeer
from loadtest import compare
from loadtest.derive import latency, ratio, rounds_of, throughput
from loadtest.small import Fixture, write


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return write(tmp_path_factory.mktemp("fixture"), adapters=4, ranks=[2], shape=TINY)


def run(
    monkeypatch: pytest.MonkeyPatch, fixture: Fixture, out: Path, drivers: list[FakePeer], *options: str
) -> tuple[int, dict]:
    known = {driver.name: driver for driver in drivers}
    monkeypatch.setattr(compare, "peers", lambda settings: known)
    words = [str(fixture.folder), "--servers", ",".join(known), "--work", str(out / "work"), "--out", str(out)]
    words += ["--num-adapters", "4", "--concurrency", "4", "--prompt-tokens", "8", "--max-tokens", "6", *options]
    code = compare.main(words)
    return code, json.loads((out / "record.json").read_text())


def test_fast_and_slow_are_told_apart_and_nobody_is_dropped(
    monkeypatch: pytest.MonkeyPatch, fixture: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = tmp_path / "journal"
    drivers = [
        FakePeer("deltaserve", "--token-seconds", "0.01", "--journal", str(journal)),
        FakePeer("slow", "--token-seconds", "0.03", "--journal", str(journal)),
        FakePeer("slow-base", "--token-seconds", "0.03", "--journal", str(journal), serves_adapters=False),
        FakePeer("absent", reason="python /nowhere is not there"),
        FakePeer("dying", "--die"),
    ]
    code, record = run(monkeypatch, fixture, tmp_path / "out", drivers, "--rounds", "2")
    assert code == 0
    assert len(record["rounds"]) == 2
    assert record["parameters"]["num_adapters"] == 4
    assert record["machine"]["cores"] >= 1
    assert record["seed"] == 0

    statuses = {name: entry["status"] for name, entry in record["servers"].items()}
    assert statuses == {
        "deltaserve": "measured",
        "slow": "measured",
        "slow-base": "measured",
        "absent": "not present",
        "dying": "failed",
    }
    assert len(record["servers"]["dying"]["failures"]) == 2

    faster = ratio(rounds_of(record, "deltaserve", "mixed"), rounds_of(record, "slow", "mixed"), throughput)
    assert faster is not None
    assert 1.5 < faster["median"] < 4  # scripted: 3
    sooner = ratio(
        rounds_of(record, "slow", "single"), rounds_of(record, "deltaserve", "single"), latency("itl", "p50")
    )
    assert sooner is not None
    assert 1.5 < sooner["median"] < 4
    assert rounds_of(record, "slow-base", "mixed") == [None, None]
    assert all(rounds_of(record, "slow-base", "base"))

    lives = [line.split() for line in journal.read_text().splitlines()]
    assert [word for word, _, _ in lives] == ["start", "end"] * 6  # never two at once

    text = (tmp_path / "out" / "table.md").read_text()
    assert "absent: not present (python /nowhere is not there)" in text
    assert "dying: version unknown; options `--die`; failed in 2 rounds" in text
    assert (tmp_path / "out" / "throughput.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in capsys.readouterr().out


def test_the_order_comes_from_the_seed_and_every_server_gets_the_same_prompts(
    monkeypatch: pytest.MonkeyPatch, fixture: Fixture, tmp_path: Path
) -> None:
    orders = []
    for out in ("one", "two"):
        drivers = [FakePeer(name) for name in ("deltaserve", "b")]
        options = ("--rounds", "2", "--cases", "mixed", "--requests-per-stream", "1", "--check", "0", "--seed", "5")
        _, record = run(monkeypatch, fixture, tmp_path / out, drivers, *options)
        orders.append([entry["order"] for entry in record["rounds"]])
        # The fake's answer is a function of the prompt: all of an answer in common means the same prompt.
        assert all(entry["agreement"]["mixed"] == {"b": 1.0} for entry in record["rounds"])
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders[0]}) > 1


def test_wrong_adapters_and_answers_that_change_show_in_the_table(
    monkeypatch: pytest.MonkeyPatch, fixture: Fixture, tmp_path: Path
) -> None:
    drivers = [FakePeer("deltaserve", "--forgetful"), FakePeer("mistaken", "--mistaken")]
    options = ("--rounds", "1", "--cases", "mixed,base", "--requests-per-stream", "1", "--check", "3")
    code, record = run(monkeypatch, fixture, tmp_path, drivers, *options)
    assert code == 0
    mixed = record["rounds"][0]["results"]["deltaserve"]["mixed"]
    assert mixed["alone"] == {"checked": 3, "different": 3}
    assert record["rounds"][0]["agreement"]["mixed"]["mistaken"] < 0.5
    assert "| deltaserve | mixed | 0 of 3 |" in (tmp_path / "table.md").read_text()


def test_nobody_to_measure_is_a_failure(monkeypatch: pytest.MonkeyPatch, fixture: Fixture, tmp_path: Path) -> None:
    code, record = run(monkeypatch, fixture, tmp_path, [FakePeer("absent", reason="not here")], "--rounds", "1")
    assert code == 1
    assert record["servers"]["absent"] == {"status": "not present", "reason": "not here"}


@pytest.mark.parametrize(
    "words",
    [
        ["--servers", "nobody"],
        ["--cases", "everything"],
        ["--num-adapters", "5"],
        ["--rank", "3"],
        ["--rounds", "0"],
        ["--concurrency", "0"],
        ["--peers", "/nowhere/peers.toml"],
    ],
)
def test_flags_that_make_no_sense_are_told(
    fixture: Fixture, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([str(fixture.folder), "--num-adapters", "4", "--out", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err.startswith("loadtest: ")
