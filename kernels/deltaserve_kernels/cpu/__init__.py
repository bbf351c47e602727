"""C++ operators for CPUs."""

from __future__ import annotations


def is_available() -> bool:
    return False


def unavailable_reason() -> str:
    return "not written yet"
