"""Where an adapter begins to act in a prompt."""

from __future__ import annotations

from collections.abc import Sequence


def start_of(prompt_ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """The position of the last occurrence of ``invocation`` (at least one token), None without one."""
    first, length = invocation[0], len(invocation)
    wanted = tuple(invocation)
    for start in range(len(prompt_ids) - length, -1, -1):
        if prompt_ids[start] == first and tuple(prompt_ids[start : start + length]) == wanted:
            return start
    return None
