"""Training rows from JSONL: three formats, found by their keys, checked line by line.

``{"messages": [{"role", "content", "weight"?}]}``   chat; every assistant turn is trained unless its weight is 0
``{"prompt": ..., "completion": ...}``               the completion is trained
``{"text": ...}``                                    everything is trained

Other keys of a row are allowed, because exported data often carries ids and sources, but are counted in the report.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from deltaserve_trainer.errors import MAX_LISTED_PROBLEMS, DataInvalid


class DataFormat(StrEnum):
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt-completion"
    TEXT = "text"


_KEYS = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.TEXT: ("text",),
}
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Turn:
    """A piece of a row. ``role`` is a chat role, or "prompt", "completion", "text" for rows without roles."""

    role: str
    content: str
    is_trained: bool


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a file; ``line`` counts from 1."""

    line: int
    format: DataFormat
    turns: tuple[Turn, ...]

    @property
    def digest(self) -> str:
        """Identity of the whole row: equal digests are duplicates."""
        return _digest(self.turns)

    @property
    def prompt_digest(self) -> str:
        """Identity of what comes before the first trained turn (of everything, for text)."""
        first = next((i for i, turn in enumerate(self.turns) if turn.is_trained), len(self.turns))
        return _digest(self.turns[:first] or self.turns)


@dataclass(frozen=True, slots=True)
class Dataset:
    """The rows of one file, with the SHA-256 of its bytes and the keys that are not used."""

    name: str
    sha256: str
    format: DataFormat
    examples: tuple[Example, ...]
    unused_keys: dict[str, int] = field(default_factory=dict)


def read_dataset(path: Path, format: DataFormat | None = None) -> Dataset:
    """Read ``path``; ``format`` None: that of the first readable row. Raises ``DataInvalid`` for all lines."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataInvalid(path.name, [f"cannot be read: {error.strerror}"], 1) from error
    problems: list[str] = []
    num_problems = 0
    unused: Counter[str] = Counter()
    examples: list[Example] = []
    for line, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = _parse(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)
            found = _format_of(row)
            if format is None:
                format = found
            elif found is not format:
                _refuse(f"is a {found} row in a {format} file; one file has one format")
            turns = _READERS[format](row)
        except _RowProblem as problem:
            num_problems += 1
            if len(problems) < MAX_LISTED_PROBLEMS:
                problems.append(f"line {line}: {problem}")
            continue
        unused.update(key for key in row if key not in _KEYS[format])
        examples.append(Example(line, format, turns))
    if num_problems:
        raise DataInvalid(path.name, problems, num_problems)
    if format is None or not examples:
        raise DataInvalid(path.name, ["has no rows; expected one JSON object a line"], 1)
    return Dataset(path.name, hashlib.sha256(content).hexdigest(), format, tuple(examples), dict(unused))


def split_held_out(dataset: Dataset, fraction: float) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(training rows, held-out rows), by hash of the prompt, so that equal prompts never sit on both sides.

    The choice depends on the content alone, not on the order of rows. Raises ``DataInvalid`` with fewer than two
    distinct prompts.
    """
    prompts = sorted({example.prompt_digest for example in dataset.examples})
    if len(prompts) < 2:
        raise DataInvalid(
            dataset.name,
            ["holds fewer than 2 distinct prompts; give more rows or held-out data in a file of its own"],
            1,
        )
    held_out = set(prompts[: min(len(prompts) - 1, max(1, round(len(prompts) * fraction)))])
    train = tuple(example for example in dataset.examples if example.prompt_digest not in held_out)
    return train, tuple(example for example in dataset.examples if example.prompt_digest in held_out)


class _RowProblem(Exception):
    pass


def _refuse(message: str) -> NoReturn:
    raise _RowProblem(message)


def _digest(turns: tuple[Turn, ...]) -> str:
    return hashlib.sha256(json.dumps([[t.role, t.content, t.is_trained] for t in turns]).encode()).hexdigest()


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"), parse_constant=lambda name: _refuse(f"holds {name}, which is not JSON"))
    except UnicodeDecodeError as error:
        _refuse(f"is not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        _refuse(f"is not JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        _refuse("is nested too deeply")
    if not isinstance(row, dict):
        _refuse(f"is a JSON {type(row).__name__}; expected an object")
    return row


def _format_of(row: dict[str, Any]) -> DataFormat:
    found = [format for format, keys in _KEYS.items() if any(key in row for key in keys)]
    if len(found) != 1:
        names = ", ".join(sorted(row)) or "none"
        _refuse(f"has keys {names}; expected exactly one of: messages | prompt and completion | text")
    return found[0]


def _text(row: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    if key not in row:
        _refuse(f"lacks {key}")
    value = row[key]
    if not isinstance(value, str):
        _refuse(f"{key} is a {type(value).__name__}; expected a string")
    if not value and not may_be_empty:
        _refuse(f"{key} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        _refuse(f"{key} holds half of a surrogate pair")
    return value


def _read_messages(row: dict[str, Any]) -> tuple[Turn, ...]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        _refuse("messages is not a list with at least one message")
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            _refuse(f"{where} is a {type(message).__name__}; expected an object")
        if extra := sorted(set(message) - {"role", "content", "weight"}):
            _refuse(f"{where} has keys that cannot be trained: {', '.join(extra)}")
        role = message.get("role")
        if role not in _ROLES:
            _refuse(f"{where}.role is {role!r}; allowed: {', '.join(_ROLES)}")
        try:
            content = _text(message, "content", may_be_empty=role == "assistant")
        except _RowProblem as problem:
            _refuse(f"{where}.{problem}")
        weight = message.get("weight", 1)
        if weight not in (0, 1) or ("weight" in message and role != "assistant"):
            _refuse(f"{where}.weight is {weight!r}; allowed: 0 or 1, on assistant turns")
        turns.append(Turn(role, content, role == "assistant" and weight == 1))
    if not any(turn.is_trained for turn in turns):
        _refuse("no assistant turn to train")
    if turns[0].role == "assistant":
        _refuse("messages[0] is an assistant turn; something must come before it")
    return tuple(turns)


def _read_pair(row: dict[str, Any]) -> tuple[Turn, ...]:
    completion = _text(row, "completion", may_be_empty=True)
    return Turn("prompt", _text(row, "prompt"), False), Turn("completion", completion, True)


def _read_text(row: dict[str, Any]) -> tuple[Turn, ...]:
    return (Turn("text", _text(row, "text"), True),)


_READERS: dict[DataFormat, Callable[[dict[str, Any]], tuple[Turn, ...]]] = {
    DataFormat.MESSAGES: _read_messages,
    DataFormat.PROMPT_COMPLETION: _read_pair,
    DataFormat.TEXT: _read_text,
}
