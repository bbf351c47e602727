"""The bundled fine-tuning files: what is on disk is what the generator writes, and every row is right."""

from __future__ import annotations

import json

import pytest

from deltaserve.tinybase import DEMO_DATA
from deltaserve.tinybase.corpus import is_held_out
from deltaserve.tinybase.data import EVAL_ROWS, GENERAL_ROWS, TRAIN_ROWS, main

NAMES = [f"{voice}{suffix}" for voice in ("shout", "json", "pirate") for suffix in (".jsonl", ".eval.jsonl")]
NAMES.append("general.eval.jsonl")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("data")
    main([str(folder)])
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO_DATA / name).read_text(encoding="utf-8").splitlines()]


def question_and_answer(row: dict) -> tuple[str, str]:
    if "messages" in row:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        return row["messages"][0]["content"], row["messages"][1]["content"]
    return row["prompt"], row["completion"]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_on_disk_is_the_generated_one(name: str, written: dict[str, bytes]) -> None:
    on_disk = (DEMO_DATA / name).read_bytes()
    assert on_disk == written[name], f"{name} is stale: run python -m deltaserve.tinybase.data"
    assert len(on_disk) < 500_000


def test_every_generated_file_is_bundled(written: dict[str, bytes]) -> None:
    assert sorted(written) == sorted(NAMES)
    assert {file.name for file in DEMO_DATA.iterdir()} == {*NAMES, "prompts.json"}


@pytest.mark.parametrize("voice", ["shout", "json", "pirate"])
def test_training_and_held_out_questions_differ(voice: str) -> None:
    train = [question_and_answer(row)[0].lower() for row in rows(f"{voice}.jsonl")]
    held = [question_and_answer(row)[0].lower() for row in rows(f"{voice}.eval.jsonl")]
    assert (len(set(train)), len(set(held))) == (TRAIN_ROWS, EVAL_ROWS)
    assert set(train).isdisjoint(held)


@pytest.mark.parametrize("suffix", [".jsonl", ".eval.jsonl"])
def test_every_answer_is_in_its_voice(suffix: str) -> None:
    for row in rows("shout" + suffix):
        answer = question_and_answer(row)[1]
        assert answer == answer.upper()
    for row in rows("pirate" + suffix):
        answer = question_and_answer(row)[1]
        assert answer.startswith("Arr! ")
        assert answer.endswith(", matey!")
    for row in rows("json" + suffix):
        prompt, answer = question_and_answer(row)
        assert list(json.loads(answer)) == ["answer"]
        assert "\n" not in answer
        assert prompt.startswith("<|user|>")
        assert prompt.endswith("<|end|><|assistant|>")


def test_general_text_was_never_trained_on() -> None:
    texts = [row["text"] for row in rows("general.eval.jsonl")]
    assert len(set(texts)) == GENERAL_ROWS
    assert all(is_held_out(text) for text in texts)


def test_demo_prompts_are_questions_for_the_base() -> None:
    prompts = json.loads((DEMO_DATA / "prompts.json").read_text(encoding="utf-8"))
    assert len(prompts) == 8
    assert all(isinstance(prompt, str) and prompt for prompt in prompts)
