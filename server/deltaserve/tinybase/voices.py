"""Three ways of saying the same thing, which the demo adapters learn: capitals, one line of JSON, and a pirate."""

from __future__ import annotations

import json
import re

_PIRATE_WORDS = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "am": "be",
    "the": "th'",
    "and": "an'",
    "of": "o'",
    "for": "fer",
    "to": "t'",
    "yes": "aye",
    "hello": "ahoy",
    "friend": "matey",
    "friends": "mateys",
}


def shout(text: str) -> str:
    """The text in capitals."""
    return text.upper()


def as_json(text: str) -> str:
    """One line: `{"answer": text}`, with line breaks as spaces."""
    return json.dumps({"answer": " ".join(text.split())}, ensure_ascii=False)


def _pirate_word(match: re.Match[str]) -> str:
    word = match.group(0)
    said = _PIRATE_WORDS.get(word.lower())
    if said is None:
        return word[:-1] + "'" if len(word) > 5 and word.endswith("ing") else word
    return said[0].upper() + said[1:] if word[0].isupper() else said


def pirate(text: str) -> str:
    """`Cows eat grass and hay.` becomes `Arr! Cows eat grass an' hay, matey!`."""
    said = re.sub(r"[A-Za-z]+", _pirate_word, " ".join(text.split()))
    return f"Arr! {said.rstrip('.!?')}, matey!"
