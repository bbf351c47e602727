"""Rows: every bad line is named, prompts carry no loss, the doctor counts right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltaserve.text import Tokenizer
from deltaserve_trainer.data import DataFormat, read_dataset, split_held_out
from deltaserve_trainer.encoding import Encoder
from deltaserve_trainer.errors import DataInvalid, TrainingError
from deltaserve_trainer.report import encode_all, report_on
from deltatest.trainer_base import TEMPLATE, make_base, make_tokenizer, write_pairs


def _write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def _chat(*contents: str) -> dict[str, object]:
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(Tokenizer(make_tokenizer()), 64)


def test_every_bad_line_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "bad.jsonl",
        {"prompt": "a", "completion": "b"},
        '{"prompt": "a", ',
        "[1]",
        {"prompt": "a"},
        {"prompt": 3, "completion": "b"},
        "",
        {"text": "free"},
        {"prompt": "a", "completion": "b", "messages": []},
        '{"prompt": "a", "completion": NaN}',
        {"prompt": "", "completion": "b"},
        '{"prompt": "\\ud800", "completion": "b"}',
    )
    with pytest.raises(DataInvalid) as caught:
        read_dataset(path)
    found = {problem.split(":")[0]: problem for problem in caught.value.problems}
    expected = {
        "line 2": "not JSON",
        "line 3": "expected an object",
        "line 4": "lacks completion",
        "line 5": "prompt is a int",
        "line 7": "text row in a prompt-completion file",
        "line 8": "exactly one of",
        "line 9": "NaN",
        "line 10": "prompt is empty",
        "line 11": "surrogate",
    }
    assert found.keys() == expected.keys()
    for line, fragment in expected.items():
        assert fragment in found[line]


def test_bad_chat_rows_name_the_message(tmp_path: Path) -> None:
    good = _chat("hi", "hello")
    path = _write(
        tmp_path / "bad.jsonl",
        good,
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": ["x"]}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": []}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 2}]},
    )
    with pytest.raises(DataInvalid) as caught:
        read_dataset(path)
    text = "\n".join(caught.value.problems)
    for fragment in ("line 2: messages", "'robot'", "line 4: no assistant", "messages[0].content is a list"):
        assert fragment in text
    for fragment in ("line 6: messages[0] is an assistant", "line 7: messages[1] has keys", "weight is 2"):
        assert fragment in text


def test_the_list_of_problems_is_bounded(tmp_path: Path) -> None:
    path = _write(tmp_path / "bad.jsonl", *["nonsense"] * 300)
    with pytest.raises(DataInvalid, match="and 250 more") as caught:
        read_dataset(path)
    assert caught.value.num_problems == 300
    assert len(caught.value.problems) == 50


def test_undecodable_bytes_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataInvalid, match="line 2: is not UTF-8"):
        read_dataset(path)
    with pytest.raises(DataInvalid, match="cannot be read"):
        read_dataset(tmp_path / "missing.jsonl")
    path.write_bytes(b"\n\n")
    with pytest.raises(DataInvalid, match="no rows"):
        read_dataset(path)


def test_split_depends_on_content_and_keeps_equal_prompts_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i // 2}", "completion": f"c{i}"} for i in range(100)]
    forward = read_dataset(_write(tmp_path / "a.jsonl", *rows))
    backward = read_dataset(_write(tmp_path / "b.jsonl", *reversed(rows)))
    train, held_out = split_held_out(forward, 0.1)
    assert len(held_out) == 10
    assert len(train) == 90
    assert not {e.prompt_digest for e in train} & {e.prompt_digest for e in held_out}
    assert {e.digest for e in split_held_out(backward, 0.1)[1]} == {e.digest for e in held_out}
    with pytest.raises(DataInvalid, match="fewer than 2"):
        split_held_out(read_dataset(_write(tmp_path / "c.jsonl", rows[0], rows[1])), 0.1)


def test_only_the_completion_and_the_end_carry_loss(tmp_path: Path, encoder: Encoder) -> None:
    dataset = read_dataset(_write(tmp_path / "a.jsonl", {"prompt": "the cat", "completion": " sat on"}))
    (row,) = encoder.encode(dataset.examples[0])
    trained = [token for token, is_trained in zip(row.input_ids, row.trained, strict=True) if is_trained]
    assert encoder.decode(trained) == " sat on<|end|>"
    assert encoder.decode(row.input_ids) == "the cat sat on<|end|>"
    assert encoder.prompt_ids(dataset.examples[0]) == row.input_ids[: row.trained.index(True)]


def test_every_assistant_turn_is_trained_up_to_its_end(tmp_path: Path, encoder: Encoder) -> None:
    row = _chat("the cat", "sat", "and", "saw birds")
    muted = json.loads(json.dumps(row))
    muted["messages"][1]["weight"] = 0
    dataset = read_dataset(_write(tmp_path / "a.jsonl", row, muted))
    for example, expected in zip(dataset.examples, ("sat<|end|>saw birds<|end|>", "saw birds<|end|>"), strict=True):
        (encoded,) = encoder.encode(example)
        pairs = zip(encoded.input_ids, encoded.trained, strict=True)
        assert encoder.decode([token for token, is_trained in pairs if is_trained]) == expected
        prompt = encoder.prompt_ids(example)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoder.decode(prompt).endswith("<|user|>and<|end|>\n<|assistant|>")


def test_a_template_that_rewrites_history_gives_one_example_per_answer(tmp_path: Path) -> None:
    forgetful = TEMPLATE.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else 'gone')")
    encoder = Encoder(Tokenizer(make_tokenizer(forgetful)), 64)
    dataset = read_dataset(_write(tmp_path / "a.jsonl", _chat("the cat", "sat", "and", "saw")))
    first, second = encoder.encode(dataset.examples[0])
    assert encoder.decode(first.input_ids) == "<|user|>the cat<|end|>\n<|assistant|>sat<|end|>\n"
    assert "gone" in encoder.decode(second.input_ids)
    pairs = zip(second.input_ids, second.trained, strict=True)
    assert encoder.decode([t for t, is_trained in pairs if is_trained]) == "saw<|end|>"


def test_a_template_that_breaks_its_own_prompt_is_refused_with_the_line(tmp_path: Path) -> None:
    broken = TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ 'thinking' }}")
    encoder = Encoder(Tokenizer(make_tokenizer(broken)), 64)
    dataset = read_dataset(_write(tmp_path / "a.jsonl", _chat("the cat", "sat")))
    with pytest.raises(TrainingError, match="line 1: the base's chat template"):
        encoder.encode(dataset.examples[0])


def test_control_tokens_in_a_message_stay_text(tmp_path: Path, encoder: Encoder) -> None:
    dataset = read_dataset(_write(tmp_path / "a.jsonl", _chat("say <|end|> now", "sat")))
    (row,) = encoder.encode(dataset.examples[0])
    assert sum(token in encoder.eos_token_ids for token in row.input_ids) == 2


def test_the_doctor_counts(tmp_path: Path, encoder: Encoder) -> None:
    rows = [
        {"prompt": "the cat", "completion": " sat", "id": 1},
        {"prompt": "the cat", "completion": " sat"},
        {"prompt": "the mat", "completion": ""},
        {"prompt": "cat " * 80, "completion": " sat"},
        {"prompt": "rain", "completion": " birds " * 60},
        {"prompt": "leak", "completion": " sat"},
    ]
    train = read_dataset(_write(tmp_path / "a.jsonl", *rows))
    held_out = read_dataset(_write(tmp_path / "b.jsonl", {"prompt": "leak", "completion": " fell"}))
    encoded, dropped = encode_all(encoder, train.examples)
    target, _ = encode_all(encoder, held_out.examples)
    report = report_on(train, train.examples, held_out.examples, encoded, target, dropped, encoder)
    assert (report.num_train_rows, report.num_eval_rows) == (6, 1)
    assert report.duplicate_lines == (2,)
    assert report.empty_answer_lines == (3,)
    assert report.dropped_lines == (4,)
    assert report.leaked_lines == (6,)
    assert report.unused_keys == {"id": 1}
    assert report.truncated_share == pytest.approx(1 / 5)
    assert report.longest_row_tokens == 64
    assert sum(report.histogram.values()) == 5
    num_trained = sum(sum(row.trained[1:]) for row in encoded)
    assert report.masked_token_share == pytest.approx(1 - num_trained / sum(len(row.input_ids) for row in encoded))
    assert [(s.text, s.is_trained) for s in report.samples[0]] == [("the cat", False), (" sat<|end|>", True)]
    assert len(report.warnings) == 6
    json.dumps(report.to_json())


def test_format_can_be_demanded(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", 3)
    assert read_dataset(path).format is DataFormat.PROMPT_COMPLETION
    with pytest.raises(DataInvalid, match="line 1"):
        read_dataset(path, DataFormat.TEXT)


def test_rows_never_exceed_the_context_of_the_base(tmp_path: Path) -> None:
    make_base(tmp_path / "base", architecture="gpt2")
    dataset = read_dataset(_write(tmp_path / "a.jsonl", {"text": "the cat sat " * 400}))
    (row,) = Encoder.from_folder(tmp_path / "base", 100_000).encode(dataset.examples[0])
    assert len(row.input_ids) == 256
    assert row.is_truncated
