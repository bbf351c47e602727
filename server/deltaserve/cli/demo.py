"""``deltaserve demo``."""

from __future__ import annotations


def demo() -> None:
    """The guided tour: train two adapters, register them, compare all answers in one batch."""
