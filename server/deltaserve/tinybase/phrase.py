"""Templates that become sentences: `{one|two}` picks an alternative, `$name` fills a slot, `a(n)` agrees.

Only `Random.random()` is drawn from, because it is the one draw whose sequence Python promises to keep between
versions; the corpus must come out byte for byte the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import TypeVar

Item = TypeVar("Item")

_CHOICE = re.compile(r"\{([^{}]*)\}")
_SLOT = re.compile(r"\$([A-Za-z_]+)")
_ARTICLE = re.compile(r"\b([Aa])\(n\) (?=(\w))")
_SENTENCE_START = re.compile(r"(?:^|(?<=[.!?] )|(?<=\n)|(?<=[ \n]\")|(?<=^\"))([a-z])")


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """One item, evenly."""
    return items[int(rng.random() * len(items))]


def pick_some(rng: Random, items: Sequence[Item], count: int) -> list[Item]:
    """`count` different items in random order (all of them when there are fewer)."""
    pool = list(items)
    chosen: list[Item] = []
    while pool and len(chosen) < count:
        chosen.append(pool.pop(int(rng.random() * len(pool))))
    return chosen


def chance(rng: Random, probability: float) -> bool:
    """True with the given probability."""
    return rng.random() < probability


def expand(rng: Random, template: str, slots: Mapping[str, str] | None = None) -> str:
    """Resolve choices from the inside out, then slots, then `a(n)`. A slot that is not given is a KeyError."""
    text = template
    while (match := _CHOICE.search(text)) is not None:
        text = text[: match.start()] + pick(rng, match.group(1).split("|")) + text[match.end() :]
    values = slots or {}
    text = _SLOT.sub(lambda found: values[found.group(1)], text)
    return _ARTICLE.sub(lambda found: found.group(1) + ("n " if found.group(2).lower() in "aeiou" else " "), text)


def tidy(text: str) -> str:
    """Collapse doubled spaces and give every sentence its capital letter (a quotation opens one too).

    `^` forces a capital where the rule cannot see one, as after a closing quotation mark.
    """
    text = re.sub(r" {2,}", " ", text).strip()
    text = re.sub(r" ([.,!?;])", r"\1", text)
    text = re.sub(r"\^(.)", lambda found: found.group(1).upper(), text)
    return _SENTENCE_START.sub(lambda found: found.group(1).upper(), text)


def say(rng: Random, template: str, slots: Mapping[str, str] | None = None) -> str:
    """`expand`, then `tidy`."""
    return tidy(expand(rng, template, slots))


def join_words(words: Sequence[str]) -> str:
    """Join as in a sentence: `a`, `a and b`, `a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]
