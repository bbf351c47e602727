"""Does load change answers? Same prompt, same adapter version, greedy: the text must be the same, also alone."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import aiohttp

from loadtest.client import Answer, Target, ask
from loadtest.workload import Prompt


@dataclass(frozen=True, slots=True)
class Correctness:
    """``num_checked`` answers under load were compared; ``mismatches`` names (model, prompt) pairs that differed."""

    num_pairs: int
    num_checked: int
    mismatches: tuple[tuple[str, Prompt], ...]


async def check(
    session: aiohttp.ClientSession,
    target: Target,
    answers: Sequence[Answer],
    *,
    max_pairs: int = 32,
    ignore_eos: bool = False,
) -> Correctness:
    """Asks up to ``max_pairs`` (model, prompt) pairs again, one at a time, and compares with each answer under load.

    An answer of another version than the one asked alone is left out: the name was moved meanwhile.
    """
    groups: dict[tuple[str, Prompt, int], list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.is_ok:
            groups[answer.request.model, answer.request.prompt, answer.request.max_tokens].append(answer)
    pairs = sorted(groups, key=lambda key: (-len(groups[key]), key))[:max_pairs]
    checked, mismatches = 0, []
    for pair in pairs:
        alone = Answer(replace(groups[pair][0].request, at_seconds=0.0))
        await ask(session, target, alone, time.monotonic(), ignore_eos)
        same_version = [answer for answer in groups[pair] if answer.version == alone.version]
        checked += len(same_version)
        if not alone.is_ok or any(answer.text != alone.text for answer in same_version):
            mismatches.append(pair[:2])
    return Correctness(len(pairs), checked, tuple(mismatches))
