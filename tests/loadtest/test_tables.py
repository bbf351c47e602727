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
        counted = {"adapter_loads_total": loads, "adapter_evictions_total": loads - 1, "adapter_uploads_total": 0}
        background = {"operations": {"request": operations}, "failures": {"x": failed} if failed else {}}
        return {**figures(1, itl=itl), "counted": counted, "background": background}

    given = {"steady": 8, "other_adapters": 500, "background_rate": 20, "background_prompt_tokens": 8}
    given |= {"seconds": 30, "prompt_tokens": 64, "max_tokens": 64}
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
    text = render(stamped("churn", parameters=given, rounds=rounds, server={"num_adapters": 509}))
    assert "| quiet | 30.0 [20.0–40.0] | 60.0 [40.0–80.0] |  |  | 1 | 0 | 0 |" in text
    assert "| the same requests to 500 adapters in turn |" in text
    assert "| 1.32 [1.32–1.32] | 1.20 [1.20–1.20] | 501 | 500 | 500 (4 failed) |" in text


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
    assert {words[0] for words in shown_commands()} >= {"small", "compare", "capacity", "churn", "sweep", "offline"}


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'load' has no table"):
        render(stamped("load"))
