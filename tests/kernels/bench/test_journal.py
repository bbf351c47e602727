from __future__ import annotations

import json

import pytest

from deltabench.journal import Journal, read, unfinished


def test_results_are_read_back_and_done(tmp_path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.start("a")
    journal.add("lora", "a", "ok", {"added_us": 1.5})
    journal.add("lora", "b", "not present", {}, "no file")
    assert [entry["kind"] for entry in read(journal.path)] == ["started", "lora", "lora"]
    again = Journal(journal.path)
    assert again.is_done("a")
    assert again.is_done("b")
    assert not again.is_done("c")


def test_the_one_that_started_last_without_a_result_is_told(tmp_path) -> None:
    journal = Journal(tmp_path / "journal")
    assert unfinished(read(journal.path)) is None
    journal.start("a")
    journal.add("lora", "a", "ok", {})
    assert unfinished(read(journal.path)) is None
    journal.start("b")
    assert unfinished(read(journal.path)) == "b"
    assert not Journal(journal.path).is_done("b")


def test_half_a_line_is_left_out(tmp_path) -> None:
    path = tmp_path / "journal"
    path.write_text(json.dumps({"kind": "started", "key": "a"}) + '\n{"kind": "lora", "key": "a", "sta')
    assert unfinished(read(path)) == "a"


@pytest.mark.parametrize(("status", "reason"), [("fine", ""), ("failed", ""), ("skipped", "")])
def test_what_is_not_ok_says_why(tmp_path, status: str, reason: str) -> None:
    with pytest.raises(ValueError, match="reason"):
        Journal(tmp_path / "journal").add("lora", "a", status, {}, reason)
