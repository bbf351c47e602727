"""Unions that a test knows better than their type says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Kind = TypeVar("Kind")


def all_of(kind: type[Kind], found: Iterable[object]) -> list[Kind]:
    """What was found, each of this type; an ``AssertionError`` names the first that is not."""
    checked: list[Kind] = []
    for each in found:
        assert isinstance(each, kind), f"a {type(each).__name__} where each should be a {kind.__name__}"
        checked.append(each)
    return checked


def one_of(kind: type[Kind], found: Iterable[object]) -> Kind:
    """The only thing that was found."""
    (one,) = all_of(kind, found)
    return one
