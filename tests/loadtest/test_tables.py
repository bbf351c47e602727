"""The page says what the records say, and nothing else."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from loadtest import tables
from loadtest.plots_of_adapters import draw_all
from loadtest.tables import NOT_TAKEN, PAGE, PLACE, RECORDS, page_with_records, render


def latency(ttft: float, itl: float) -> dict:
    return {
        "ttft_seconds": {"count": 9, "p50": ttft, "p95": ttft, "p99": ttft},
        "itl_seconds": {"count": 9, "p50": itl, "p95": itl, "p99": 2 * itl},
    }


def figures(tokens: float, ttft: float = 0.5, itl: float = 0.02) -> dict:
    return {"tokens_per_second": tokens, "num_requests": 8, "num_succeeded": 8, "latency": latency(ttft, itl)}


def stamped(kind: str, **parts: object) -> dict:
    machine = {"processor": "Abacus 3", "cores": 2, "memory_bytes": 8 << 30, "system": "Linux x86_64", "python": "3.11"}
    head = {"kind": kind, "taken_at": "2026-01-01 00:00 UTC", "seed": 7, "machine": machine}
    return {**head, "versions": {"torch": "2.0", "commit": "abc"}, **parts}


@pytest.fixture
def compared() -> dict:
    loop = {"concurrency": 32, "requests_per_stream": 2, "prompt_tokens": 64, "max_tokens": 64}
    return stamped(
        "compare",
        parameters={"cases": {"mixed": {"models": "adapters", **loop}, "base": {"models": "base", **loop}}},
        servers={
            "deltaserve": {"status": "measured", "version": {"version": "1"}, "options": []},
            "other": {
                "status": "measured",
                "version": {"version": "2"},
                "options": ["--fast"],
                "failures": ["round 1"],
            },
            "gone": {"status": "not present", "reason": "no python is given"},
        },
        rounds=[
            {
                "results": {
                    "deltaserve": {"mixed": figures(600 * drift), "base": figures(800 * drift)},
                    **(
                        {"other": {"mixed": figures(200 * drift, 2.0), "base": figures(400 * drift)}}
                        if drift < 3
                        else {}
                    ),
                },
                "agreement": {"mixed": {"other": 0.8}} if drift < 3 else {},
            }
            for drift in (1, 2, 3)
        ],
    )


def test_the_page_matches_the_records() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_records(page, RECORDS), "run python -m loadtest.tables"


def test_every_place_of_the_page_is_known_and_named_once() -> None:
    places = [match.group(2) for match in PLACE.finditer(PAGE.read_text(encoding="utf-8"))]
    assert len(places) == len(set(places)) >= 6


def test_a_comparison_shows_medians_spreads_and_ratios_of_a_round(compared: dict) -> None:
    text = render(compared)
    assert "Abacus 3, 2 cores, 8 GiB" in text
    assert "torch 2.0, commit abc" in text
    assert "seed 7" in text
    # Ours drifts by a factor of three; the ratio to the other, taken inside each round, does not.
    assert "| deltaserve | 1,200 [600–1,800] | 500 [500–500] | 20.0 [20.0–20.0] | 40.0 [40.0–40.0] |  |  |" in text
    assert "| other | 300 [200–400] | 2,000 [2,000–2,000] |" in text
    assert "3.00 [3.00–3.00] | 4.00 [4.00–4.00] |" in text
    assert "| gone | not present |" in text
    assert "- gone: not present (no python is given)" in text
    assert "- other: version 2; options `--fast`; failed in 1 rounds" in text
    assert "| deltaserve | 0.75 [0.75–0.75] |" in text
    assert "| other | 0.50 [0.50–0.50] |" in text
    assert "| other | mixed | – | 80 % |" in text


def test_a_run_in_which_a_request_failed_has_no_throughput(compared: dict) -> None:
    compared["rounds"][0]["results"]["deltaserve"]["mixed"]["num_succeeded"] = 7
    assert "| deltaserve | 1,500 [1,200–1,800] |" in render(compared)


def test_churn_is_told_against_the_quiet_phase_of_its_round() -> None:
    def phase(itl: float, loads: int, operations: int, failed: int = 0) -> dict:
        counted = {"loads": loads, "evictions": loads - 1, "uploads": 0}
        background = {"operations": {"request": operations}, "failures": {"x": failed} if failed else {}}
        return {**figures(1, itl=itl), "counted": counted, "background": background}

    given = {"steady": 8, "other_adapters": 500, "background_rate": 20, "background_prompt_tokens": 8}
    given |= {"seconds": 30, "rounds": 2, "prompt_tokens": 64, "max_tokens": 64}
    rounds = [
        {
            "results": {
                "quiet": phase(i, 1, 0),
                "resident": phase(1.1 * i, 1, 500),
                "load": phase(1.32 * i, 501, 500, failed=2),
            }
        }
        for i in (0.02, 0.04)
    ]
    whole = {name: figures(1, itl=itl) for name, itl in (("quiet", 0.03), ("resident", 0.033), ("load", 0.045))}
    server = {"num_adapters": 509, "layers": 4, "options": ["--adapter-slots", "32"]}
    text = render(stamped("churn", parameters=given, rounds=rounds, whole=whole, server=server))
    assert "a base of 4 layers; 2 rounds, 30 s a phase, at least 9 gaps a phase" in text
    assert "room for 32 adapters on the device." in text
    assert "| nothing | 30.0 | 60.0 |  |  |  | 2 | 0 | 0 |" in text
    # 1.5 is of all gaps of the phase; each of the rounds was 1.32 times its own quiet phase.
    assert "| the same requests to 500 adapters in turn | 45.0 | 90.0 | 1.50 |" in text
    assert "| 1.50 | 1.32 [1.32–1.32] | 1.20 [1.20–1.20] | 1002 | 1000 | 1000 (4 failed) |" in text


def test_registered_adapters_are_told_against_the_noise_of_two_servers_alike() -> None:
    given = {"num_adapters": 1000, "num_resident": 990, "ranks": [8], "layers": 4, "concurrency": 16, "starts": 2}
    given |= {"requests_per_stream": 2, "prompt_tokens": 64, "max_tokens": 64}
    rounds = [
        {"results": {"none": figures(drift), "none again": figures(1.05 * drift), "adapters": figures(0.99 * drift)}}
        for drift in (1000, 2000, 3000, 1000, 2000, 3000)
    ]
    rounds[0]["results"]["adapters"] = figures(900)
    text = render(stamped("registered", parameters=given, rounds=rounds, server={}))
    assert "| none | 2,000 [1,000–3,000] | 20.00 [20.00–20.00] |  |  |  |  |" in text
    assert "| none, a second server | 2,100 [1,050–3,150] | 20.00 [20.00–20.00] | 1.050 [1.050–1.050] |" in text
    assert "| 1,000, 990 of them resident |" in text
    assert "| 0.990 [0.900–0.990] | 0.900–0.990 | 1.000 [1.000–1.000] | 1.000–1.000 |" in text
    text = render(stamped("registered", parameters=given, rounds=rounds[:5], server={}))
    assert "| 0.990 [0.900–0.990] | too few rounds |" in text


def capacity_record(points: list[dict], rounds: list[dict], laws: list[str]) -> dict:
    given = {"laws": laws, "zipf_s": 0.9, "concurrency": 16, "requests_per_stream": 1, "prompt_tokens": 64}
    base = {"name": "base", "axis": "base", "adapters": 0, "law": "distinct", "rank": None, "rank_sum": 0}
    server = {"num_adapters": 80, "layers": 30}
    parts = {"parameters": {**given, "max_tokens": 32}, "points": [base, *points], "rounds": rounds, "server": server}
    return stamped("capacity", **parts)


def test_overhead_is_foretold_by_the_rank_sum(tmp_path: Path) -> None:
    def point(name: str, rank: int | None, mean: float) -> dict:
        sums = {"rank_sum": round(16 * mean), "mean_rank": mean, "adapter_bytes": round(1e6 * mean)}
        return {"name": name, "axis": "rank", "adapters": 16, "law": "distinct", "rank": rank, **sums}

    points = [point(f"rank {rank}", rank, rank) for rank in (4, 8, 16, 64)] + [point("ranks 4 and 64", None, 34.0)]
    # A step takes 1.1 times the base and 0.5 more for each 1,000 of rank sum; the machine drifts from round to round.
    rounds = [
        {
            "results": {
                "base": figures(100, itl=0.02 * drift),
                **{p["name"]: figures(90, itl=0.02 * drift * (1.1 + p["rank_sum"] / 2000)) for p in points},
            }
        }
        for drift in (1, 2, 1.5)
    ]
    text = render(capacity_record(points, rounds, ["distinct"]))
    assert "ITL / base = 1.10 + 0.50 per 1,000 of rank sum, R² 1.000." in text
    assert "If rows were padded to rank 64, every mix would cost 1.61." in text
    assert "| ranks 4 and 64 | 544 | 34.00 | 90 [90–90] | 41.2 [27.4–54.9] | 1.37 [1.37–1.37] | 1.37 |" in text
    assert "Bytes: 1.000 MB for each rank of an adapter, R² 1.000." in text
    for entry in rounds:  # a mix that costs more than its ranks leaves the line where it is
        entry["results"]["ranks 4 and 64"] = figures(
            50, itl=1.6 * entry["results"]["base"]["latency"]["itl_seconds"]["p50"]
        )
    text = render(capacity_record(points, rounds, ["distinct"]))
    assert "ITL / base = 1.10 + 0.50 per 1,000 of rank sum, R² 1.000." in text
    assert "| 1.60 [1.60–1.60] | 1.37 |" in text
    made = draw_all(capacity_record(points, rounds, ["distinct"]), tmp_path, "capacity")
    assert [path.name for path in made] == ["capacity-overhead_against_rank.png"]


def test_popularity_has_a_column_for_each_law(tmp_path: Path) -> None:
    def point(name: str, adapters: int, law: str) -> dict:
        sizes = {"rank": 8, "rank_sum": 128, "mean_rank": 8.0, "adapter_bytes": 1}
        return {"name": name, "axis": "adapters", "adapters": adapters, "law": law, **sizes}

    points = [point("1 adapters", 1, "distinct"), point("9 adapters", 9, "distinct"), point("9, zipf", 9, "zipf")]
    tokens = {"base": 100.0, "1 adapters": 90.0, "9 adapters": 80.0, "9, zipf": 85.0}
    made = capacity_record(
        points, [{"results": {name: figures(rate) for name, rate in tokens.items()}}], ["distinct", "zipf"]
    )
    text = render(made)
    assert (
        "| adapters in the traffic | distinct, tokens/s | Zipf 0.9, tokens/s | distinct / base | Zipf 0.9 / base |"
        in text
    )
    assert "| the base alone | 100 |  |  |  |" in text
    assert "| 1 | 90 | – | 0.90 | – |" in text
    assert "| 9 | 80 | 85 | 0.80 | 0.85 |" in text
    assert [path.name for path in draw_all(made, tmp_path, "p")] == ["p-throughput_against_adapters.png"]


def test_places_are_filled_from_their_record_and_their_plots(tmp_path: Path, compared: dict) -> None:
    page = "a\n<!-- record: compare -->\nold\n<!-- end -->\nb\n<!-- record: churn -->\nold\n<!-- end -->\nc\n"
    (tmp_path / "compare.json").write_text(json.dumps(compared))
    (tmp_path / "compare-throughput.png").write_bytes(b"")
    filled = page_with_records(page, tmp_path)
    assert "old" not in filled
    assert "![throughput](benchmarks/compare-throughput.png)" in filled
    assert f"<!-- record: churn -->\n{NOT_TAKEN}<!-- end -->" in filled
    assert re.sub(r"(?s)<!-- record.*?<!-- end -->", "", filled) == "a\n\nb\n\nc\n"
    assert page_with_records(filled, tmp_path) == filled
    (tmp_path / "stray.json").write_text(json.dumps(compared))
    with pytest.raises(ValueError, match="no place of the page shows stray"):
        page_with_records(page, tmp_path)


def test_the_command_writes_and_checks(
    tmp_path: Path, compared: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("<!-- record: compare -->\n<!-- end -->\n")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    (tmp_path / "compare.json").write_text(json.dumps(compared))
    assert tables.main(["--check"]) == 1
    assert "run python -m loadtest.tables" in capsys.readouterr().err
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
    assert (tmp_path / "compare-throughput.png").read_bytes().startswith(b"\x89PNG")
    compared["rounds"][0]["results"]["deltaserve"]["mixed"]["tokens_per_second"] = 1
    (tmp_path / "compare.json").write_text(json.dumps(compared))
    assert tables.main(["--check"]) == 1


def shown_commands() -> list[list[str]]:
    """Every ``python -m loadtest ...`` line of the page's blocks, as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith("python -m loadtest ")]


@pytest.mark.parametrize("words", shown_commands(), ids=lambda words: words[0])
def test_the_commands_that_the_page_shows_parse(words: list[str]) -> None:
    name = "load" if words[0].startswith("-") else words.pop(0)
    parser = importlib.import_module(f"loadtest.{name}").arguments()
    assert isinstance(parser, argparse.ArgumentParser)
    parser.parse_args(words)


def test_the_page_shows_every_command_that_makes_a_record() -> None:
    assert {words[0] for words in shown_commands()} >= {
        "small",
        "compare",
        "capacity",
        "churn",
        "registered",
        "sweep",
        "offline",
        "kinds",
    }


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'load' has no table"):
        render(stamped("load"))
