"""The corpus of the embedded base: an endless, seeded stream of documents, with a held-out part that never trains.

Whether a document is held out is decided by the digest of its own text, so the two parts cannot share a document,
whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from random import Random
from typing import Literal, NamedTuple

from deltaserve.tinybase.chat import Message, conversation
from deltaserve.tinybase.facts import fact
from deltaserve.tinybase.stories import story
from deltaserve.tinybase.writing import animal_text, how_to, letter, notice, person_text, place_text, record

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 1 / 40


class Document(NamedTuple):
    """Either plain text or a conversation."""

    text: str | None
    messages: list[Message] | None

    @property
    def key(self) -> str:
        return self.text if self.text is not None else json.dumps(self.messages, sort_keys=True)


def _plain(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.42:
        return story(rng).text
    if roll < 0.56:
        return animal_text(rng)
    if roll < 0.66:
        return place_text(rng)
    if roll < 0.74:
        return person_text(rng)
    if roll < 0.80:
        one, text = how_to(rng)
        return f"How to {one.task}\n{text}"
    if roll < 0.83:
        return letter(rng)
    if roll < 0.93:
        return " ".join(fact(rng).answer for _ in range(4))
    if roll < 0.97:
        return notice(rng) if roll < 0.95 else story(rng).text.upper()
    return "\n".join(record(rng) for _ in range(3))


def is_held_out(key: str) -> bool:
    """Decided by the text alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") < HELDOUT_SHARE * 2**32


def documents(seed: int, split: Split) -> Iterator[Document]:
    """An endless stream of documents, about half of them conversations."""
    rng = Random(seed)
    while True:
        document = Document(_plain(rng), None) if rng.random() < 0.36 else Document(None, conversation(rng))
        if is_held_out(document.key) == (split == "heldout"):
            yield document
