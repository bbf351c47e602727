"""Rounds of a comparison: each server of a round alone on the machine, in an order drawn anew, every case on each."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

from loadtest.client import Answer, Target, run_closed
from loadtest.correctness import check
from loadtest.figures import summarize
from loadtest.peers.peer import Peer, PeerFailed, Setup
from loadtest.peers.process import running
from loadtest.workload import ClosedLoop, streams

OURS = "deltaserve"


@dataclass(frozen=True, slots=True)
class Case:
    """One workload. ``models``: who is asked, ``adapters`` (all of them), ``one`` adapter, or the ``base``."""

    name: str
    models: str
    loop: ClosedLoop

    def of(self, target: Target) -> tuple[str, ...]:
        if self.models == "base":
            return (target.base,)
        return target.adapters[:1] if self.models == "one" else target.adapters


def cases(concurrency: int, requests_per_stream: int, prompt_tokens: int, max_tokens: int) -> dict[str, Case]:
    """Every case by its name. ``mixed`` is the headline: each stream another adapter."""

    def loop(streams: int, requests: int, popularity: str = "distinct") -> ClosedLoop:
        return ClosedLoop(streams, requests, 0, popularity, prompt_tokens=prompt_tokens, max_tokens=max_tokens)

    made = [
        Case("mixed", "adapters", loop(concurrency, requests_per_stream)),
        Case("uniform", "adapters", loop(concurrency, requests_per_stream, "uniform")),
        Case("zipf", "adapters", loop(concurrency, requests_per_stream, "zipf")),
        Case("base", "base", loop(concurrency, requests_per_stream)),
        Case("single", "one", loop(1, 2 * requests_per_stream)),
        Case("single-base", "base", loop(1, 2 * requests_per_stream)),
    ]
    return {case.name: case for case in made}


@dataclass(slots=True)
class Outcome:
    """What the rounds gave: ``rounds`` for the record, and what each server is or why it was not measured."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    peers: Sequence[Peer]
    setup: Setup
    cases: Sequence[Case]
    rounds: int
    seed: int = 0
    num_checked: int = 8
    start_seconds: float = 600.0


async def compare(
    comparison: Comparison, session: aiohttp.ClientSession, after_server: Callable[[Outcome], None]
) -> Outcome:
    """Runs every round; ``after_server`` gets what there is so far. A server that fails misses that round only."""
    outcome = Outcome()
    present: list[Peer] = []
    for peer in comparison.peers:
        reason = peer.missing()
        outcome.servers[peer.name] = {"status": "not present", "reason": reason} if reason else {"status": "measured"}
        if reason is None:
            outcome.servers[peer.name] |= {"options": list(peer.options), "failures": []}
            try:
                peer.prepare(comparison.setup)
                present.append(peer)
            except PeerFailed as problem:
                outcome.servers[peer.name] |= {"status": "failed", "reason": str(problem)[:400]}
    for number in range(comparison.rounds):
        order = list(present)
        random.Random(f"{comparison.seed} {number}").shuffle(order)
        entry: dict[str, Any] = {"round": number, "order": [peer.name for peer in order], "results": {}}
        entry["load_before"] = round(os.getloadavg()[0], 2)
        texts: dict[str, dict[str, list[str]]] = {}
        outcome.rounds.append(entry)
        for peer in order:
            try:
                async with running(peer, comparison.setup, session, start_seconds=comparison.start_seconds) as target:
                    outcome.servers[peer.name]["version"] = dict(target.version)
                    entry["results"][peer.name], texts[peer.name] = await measure(
                        comparison, session, target, peer.name, number, is_checked=number == 0 or peer.name == OURS
                    )
            except PeerFailed as problem:
                outcome.servers[peer.name]["failures"].append(f"round {number}: {str(problem)[:400]}")
                print(f"  {problem}")
            entry["agreement"] = agreement(texts)
            after_server(outcome)
    for peer in present:
        if not any(peer.name in entry["results"] for entry in outcome.rounds):
            outcome.servers[peer.name] |= {"status": "failed", "reason": outcome.servers[peer.name]["failures"][-1]}
    return outcome


async def measure(
    comparison: Comparison,
    session: aiohttp.ClientSession,
    target: Target,
    name: str,
    number: int,
    *,
    is_checked: bool,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Every case on one server: ``{case: figures}`` and ``{case: texts}``. All servers get the same prompts."""
    suited = [case for case in comparison.cases if case.of(target)]
    await warm_up(suited, session, target, comparison)
    order = list(suited)
    random.Random(f"{comparison.seed} {number} {name}").shuffle(order)
    results: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for case in order:
        loop = _seeded(case.loop, seed_of(comparison, case, number))
        planned = streams(loop, case.of(target), comparison.setup.fixture.plain_tokens)
        result = await run_closed(session, target, planned)
        results[case.name] = summarize(result)
        texts[case.name] = [answer.text for answer in sorted(result.answers, key=_index)]
        if is_checked and comparison.num_checked and case.name in ("mixed", "base"):
            found = await check(session, target, result.answers, max_pairs=comparison.num_checked, ignore_eos=True)
            results[case.name]["alone"] = {"checked": found.num_checked, "different": len(found.mismatches)}
    return results, texts


async def warm_up(
    suited: Sequence[Case], session: aiohttp.ClientSession, target: Target, comparison: Comparison
) -> None:
    """Each case once with few tokens and prompts of its own: every adapter loaded, every code path taken."""
    for case in suited:
        loop = ClosedLoop(case.loop.concurrency, 1, 0, "distinct", prompt_tokens=case.loop.prompt_tokens, max_tokens=8)
        loop = _seeded(loop, seed_of(comparison, case, -1))
        models = case.of(target)
        for first in range(0, len(models), case.loop.concurrency):
            chosen = models[first : first + case.loop.concurrency]
            planned = streams(loop, chosen, comparison.setup.fixture.plain_tokens)
            result = await run_closed(session, target, planned)
            failed = [answer.error for answer in result.answers if not answer.is_ok]
            if failed:
                raise PeerFailed(f"{len(failed)} of {len(result.answers)} warm-up requests failed: {failed[0]}")


def seed_of(comparison: Comparison, case: Case, number: int) -> int:
    return 100_000 * comparison.seed + 100 * (number + 1) + [c.name for c in comparison.cases].index(case.name)


def _seeded(loop: ClosedLoop, seed: int) -> ClosedLoop:
    return ClosedLoop(**{**asdict(loop), "seed": seed})


def _index(answer: Answer) -> int:
    return answer.request.index


def agreement(texts: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, dict[str, float]]:
    """For each case and other server: the mean share of an answer that both begin with alike, ours being the measure.

    Greedy answers of different arithmetic part ways at some token; a wrongly chosen adapter parts at the first.
    """
    found: dict[str, dict[str, float]] = {}
    for case, ours in texts.get(OURS, {}).items():
        for server, answers in texts.items():
            if server != OURS and case in answers:
                shares = [
                    _common_beginning(a, b) / max(len(a), len(b), 1) for a, b in zip(ours, answers[case], strict=True)
                ]
                found.setdefault(case, {})[server] = sum(shares) / len(shares)
    return found


def _common_beginning(one: str, other: str) -> int:
    """Characters until the first difference."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
