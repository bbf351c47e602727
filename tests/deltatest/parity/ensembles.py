"""Ensembles of the table's adapters: the server decodes them in lock-step, the judge mixes what the members' own judges
say of the same tokens.

Answers are greedy and give the log probabilities of the whole vocabulary before each token. Where every token that was
drawn is the likeliest of the offline mix, after the tokens before it, the answer is the one that members computed one
by one would give.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaserve.core import (
    BASE_BINDING,
    Binding,
    Ensemble,
    GenerationRequest,
    Member,
    Mix,
    SamplingParams,
    SequenceDelta,
)
from deltatest.parity.registry import TOLERANCE, Bench, Entry, evict
from deltatest.peft_adapters import base_logits
from deltatest.runtime_factory import TinyRuntime

NUM_ANSWERED = 16
BASE = ""
"""The base as a member."""
_PROMPT = (11, 150, 7, 42, 96, 3, 180, 23, 71)


@dataclass(frozen=True)
class Case:
    """``members``: names of entries, or ``BASE``, with their weights. One may be there twice."""

    name: str
    mix: Mix
    members: tuple[tuple[str, float], ...]

    @property
    def told(self) -> str:
        return ", ".join(f"{weight:g} {member or 'base'}" for member, weight in self.members)


CASES = (
    Case("mean", Mix.LOGITS, (("lora", 0.5), ("ia3", 0.5))),
    Case("contrast", Mix.LOGITS, (("lora-all-biases-and-whole-modules", 1.5), (BASE, -0.5))),
    Case(
        "many kinds",
        Mix.LOGITS,
        (("prefix-tuning", 0.3), ("oft", 0.2), ("shira", 0.2), ("deltaserve-dense-delta", 0.2), (BASE, 0.1)),
    ),
    Case("mixture", Mix.PROBABILITIES, (("lora-dora", 2.0), ("deltaserve-terms", 1.0), ("cpt", 0.5))),
)


@dataclass(frozen=True)
class EnsembleRow:
    """Of log probabilities, ``[NUM_ANSWERED, vocab]``. ``effect``: max |mix - base| of the judges; ``alone`` and
    ``mixed``: max |server - judge|; ``limit``: what these may be. ``likeliest``: how many tokens are the offline mix's.
    ``company_bits`` and ``reload_bits`` as of ``Row``; tokens count as bits, too."""

    case: Case
    effect: float
    alone: float
    mixed: float
    limit: float
    likeliest: int
    company_bits: bool
    reload_bits: bool

    @property
    def is_good(self) -> bool:
        near = max(self.alone, self.mixed) <= self.limit < self.effect
        return near and self.likeliest == NUM_ANSWERED and self.company_bits and self.reload_bits


@dataclass(frozen=True)
class Adapters:
    """What the table's adapters are: entries by name, their files, and how a request binds them."""

    entries: Mapping[str, Entry]
    folders: Mapping[str, Path]
    bindings: Mapping[str, Binding]


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    logprobs: Tensor
    """Float32 [NUM_ANSWERED, vocab]."""

    def has_bits_of(self, other: Answer) -> bool:
        return self.token_ids == other.token_ids and torch.equal(self.logprobs, other.logprobs)


async def measure_ensembles(
    runtime: TinyRuntime, bench: Bench, adapters: Adapters, cases: Sequence[Case]
) -> list[EnsembleRow]:
    """Rows in the order of ``cases``."""
    together = await _in_company(runtime, adapters, cases)
    rows = []
    for case, beside in zip(cases, together, strict=True):
        alone = await _answer(runtime, _ensemble(case, adapters))
        for name, _ in case.members:
            if name != BASE:
                await evict(runtime.engine, adapters.bindings[name].versions[0])
        again = await _answer(runtime, _ensemble(case, adapters))
        expected = _judge(bench.model, adapters, case, alone.token_ids)
        limit = TOLERANCE * max(1.0, float(expected.square().mean().sqrt()))
        drawn = expected.gather(1, torch.tensor(alone.token_ids)[:, None])[:, 0]
        ids = (*_PROMPT, *alone.token_ids)
        plain = base_logits(bench.model, ids)[len(_PROMPT) - 1 : -1].double().log_softmax(dim=-1)
        rows.append(
            EnsembleRow(
                case=case,
                effect=float((expected - plain).abs().max()),
                alone=float((alone.logprobs - expected).abs().max()),
                mixed=float((beside.logprobs - expected).abs().max()),
                limit=limit,
                likeliest=int((drawn >= expected.amax(dim=1) - limit).sum()),
                company_bits=beside.has_bits_of(alone),
                reload_bits=again.has_bits_of(alone),
            )
        )
    return rows


def _judge(model: Any, adapters: Adapters, case: Case, answered: Sequence[int]) -> Tensor:
    """Float64 [NUM_ANSWERED, vocab]: log probabilities of the mix before each of the answer's tokens, each member
    reading prompt and answer by itself."""
    ids = (*_PROMPT, *answered)
    each = []
    for name, _ in case.members:
        entry = adapters.entries.get(name)
        logits = base_logits(model, ids) if entry is None else entry.oracle(model, adapters.folders[name], ids)
        each.append(logits[len(_PROMPT) - 1 : -1].double())
    weights = torch.tensor([weight for _, weight in case.members], dtype=torch.float64)[:, None, None]
    if case.mix is Mix.LOGITS:
        return (weights * torch.stack(each)).sum(dim=0).log_softmax(dim=-1)
    return (weights / weights.sum() * torch.stack(each).softmax(dim=-1)).sum(dim=0).log()


def _ensemble(case: Case, adapters: Adapters) -> Ensemble:
    bindings = [BASE_BINDING if name == BASE else adapters.bindings[name] for name, _ in case.members]
    weights = [weight for _, weight in case.members]
    return Ensemble(tuple(Member(*pair) for pair in zip(bindings, weights, strict=True)), case.mix)


async def _in_company(runtime: TinyRuntime, adapters: Adapters, cases: Sequence[Case]) -> list[Answer]:
    """All ensembles, a sequence of every adapter and one of the base, decoded in the same steps for a while."""
    bindings = [BASE_BINDING, *adapters.bindings.values()]
    wanted = len(bindings) + sum(len(case.members) for case in cases)
    for binding in bindings[1:]:
        await runtime.engine.preload(binding.versions[0])
    runner: Any = runtime.engine._engine._runner
    execute, sizes = runner.execute, [0]
    runner.execute = lambda batch: sizes.append(len(batch)) or execute(batch)
    try:
        ensembles = [_answer(runtime, _ensemble(case, adapters)) for case in cases]
        found = await asyncio.gather(*ensembles, *(_decode(runtime, binding=each) for each in bindings))
    finally:
        runner.execute = execute
    if max(sizes) != wanted:
        raise AssertionError(f"{wanted} rows never met in one step; the largest had {max(sizes)}")
    return found[: len(cases)]


async def _answer(runtime: TinyRuntime, ensemble: Ensemble) -> Answer:
    width = runtime.base.vocab_size
    outputs = await _decode(runtime, width, ensemble=ensemble)
    tokens = [token for delta in outputs for token in delta.token_ids]
    rows = []
    for told in (logprob for delta in outputs for logprob in delta.logprobs):
        places, values = zip(*told.top, strict=True)
        rows.append(torch.full((width,), torch.nan).index_put((torch.tensor(places),), torch.tensor(values)))
    return Answer(tuple(tokens), torch.stack(rows))


async def _decode(runtime: TinyRuntime, logprobs: int | None = None, **models: Any) -> list[SequenceDelta]:
    runtime.num_requests += 1
    sampling = SamplingParams(max_tokens=NUM_ANSWERED, temperature=0.0, ignore_eos=True, logprobs=logprobs)
    request = GenerationRequest(f"parity-{runtime.num_requests}", _PROMPT, sampling, **models)
    return [delta async for output in runtime.engine.submit(request) for delta in output.deltas]
