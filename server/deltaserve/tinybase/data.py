"""The bundled fine-tuning data: the base's kind of answers in another voice, and ordinary text to notice forgetting.

Run as `python -m deltaserve.tinybase.data [DIR]` to write the files again; they come out byte for byte the same.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from deltaserve.tinybase import DEMO_DATA
from deltaserve.tinybase.chat import (
    common_turn,
    describe_turn,
    fact_turn,
    how_to_turn,
    list_turn,
    small_turn,
    story_turn,
)
from deltaserve.tinybase.corpus import documents
from deltaserve.tinybase.phrase import pick
from deltaserve.tinybase.tokenizer import ASSISTANT, END, USER
from deltaserve.tinybase.voices import as_json, pirate, shout

TRAIN_ROWS, EVAL_ROWS, GENERAL_ROWS = 2000, 60, 200
_SEED = 2026
_TURNS = (
    *(fact_turn,) * 10,
    *(common_turn,) * 2,
    *(describe_turn,) * 3,
    *(small_turn,) * 2,
    list_turn,
    how_to_turn,
    *(story_turn,) * 2,
)
Row = dict[str, Any]


def _chat_row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _prompt_row(question: str, answer: str) -> Row:
    """Prompt/completion rows are text without a template, so the turns' marks are written out (see `tokenizer`)."""
    return {"prompt": f"{USER}{question}{END}{ASSISTANT}", "completion": answer}


def _json_answer(answer: str) -> str:
    """The first two sentences as JSON, without spoken words and without the last full stop.

    So the answer holds no escapes and ends in marks that the base knows: a small adapter learns a form, not tokens.
    """
    parts = re.split(r"(?<=[.!?])\s+", answer)
    sentences = [part for part in parts if '"' not in part and not part[0].isdigit()] or [answer.replace('"', "")]
    return as_json(" ".join(sentences[:2]).rstrip(".!?"))


VOICES: dict[str, tuple[Callable[[str], str], Callable[[str, str], Row]]] = {
    "shout": (shout, _chat_row),
    "json": (_json_answer, _prompt_row),
    "pirate": (pirate, _chat_row),
}


def _questions(rng: Random) -> Iterator[tuple[str, str]]:
    """Endless single questions with the base's own answers; no question comes twice."""
    seen: set[str] = set()
    while True:
        question, answer = pick(rng, _TURNS)(rng)[0]
        if question.lower() not in seen:
            seen.add(question.lower())
            yield question, answer


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def files() -> dict[str, str]:
    """File name -> content. Training and held-out rows of a voice share no question."""
    made: dict[str, str] = {}
    for number, (name, (voice, row)) in enumerate(VOICES.items()):
        source = _questions(Random(_SEED + number))
        rows = [
            row(question, voice(answer)) for question, answer in (next(source) for _ in range(TRAIN_ROWS + EVAL_ROWS))
        ]
        made[f"{name}.jsonl"] = _lines(rows[:TRAIN_ROWS])
        made[f"{name}.eval.jsonl"] = _lines(rows[TRAIN_ROWS:])
    general: dict[str, None] = {}
    stream = documents(_SEED, "heldout")
    while len(general) < GENERAL_ROWS:
        text = next(stream).text
        # Notices and records are not ordinary prose.
        if text is not None and not text.isupper() and not text.startswith("{"):
            general[text] = None
    made["general.eval.jsonl"] = _lines([{"text": text} for text in general])
    return made


def main(arguments: Sequence[str]) -> None:
    """Write every file to the given folder, or to the package's own."""
    folder = Path(arguments[0]) if arguments else DEMO_DATA
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files().items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
        print(f"{name}: {len(content.splitlines())} rows, {len(content.encode()) // 1024} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
