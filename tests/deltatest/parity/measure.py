"""Takes every entry through the door of a real runtime and measures it there: alone, in company, at strength 0, again
after eviction. Ensembles of them are measured last (``deltatest.parity.ensembles``).

Probes run like requests: scheduler, pages, tables, operators. The mixed batch holds one sequence of each entry and one
of the base, all in the same steps, which is checked.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.api.activation import start_of
from deltaserve.config import MIB, EngineConfig
from deltaserve.core import BASE_BINDING, Binding, BindingPart, Logits
from deltaserve.engine import scheduler
from deltaserve.model.base import BaseModel, load_base
from deltatest.parity.ensembles import Adapters, Case, EnsembleRow, measure_ensembles
from deltatest.parity.registry import BASE_NAME, TOLERANCE, Bench, Entry, evict
from deltatest.peft_adapters import base_logits
from deltatest.runtime_factory import TinyRuntime, open_runtime
from deltatest.tiny_models import save_random, tiny_config

NUM_TOKENS = 24
NUM_STREAMS = 8
NUM_DECODED = 40
NUM_ROUNDS = 4


@dataclass(frozen=True)
class Row:
    """``effect``: max |oracle - base|; ``alone`` and ``mixed``: max |server - oracle|; ``limit``: what these may be.

    ``company_bits``: the bits in the mixed batch are those alone; ``zero_bits``: strength 0 gives the base's bits
    (None: the kind has no strengths); ``reload_bits``: the same bits after eviction from both tiers and a reload;
    ``nbytes``: on the device; ``slowdown``: a decode step of ``NUM_STREAMS`` sequences with the adapter over one
    without, less 1 (None: not timed).
    """

    entry: Entry
    effect: float
    alone: float
    mixed: float
    limit: float
    company_bits: bool
    zero_bits: bool | None
    reload_bits: bool
    nbytes: int
    slowdown: float | None = None

    @property
    def is_good(self) -> bool:
        near = max(self.alone, self.mixed) <= self.limit < self.effect
        return near and self.company_bits and self.zero_bits is not False and self.reload_bits


@dataclass(frozen=True)
class Measured:
    rows: list[Row]
    ensembles: list[EnsembleRow]

    @property
    def bad(self) -> list[str]:
        """Names of what is not in parity."""
        return [row.entry.name for row in self.rows if not row.is_good] + [
            f"ensemble {row.case.name}" for row in self.ensembles if not row.is_good
        ]


def measure(entries: Sequence[Entry], cases: Sequence[Case] = (), *, is_timed: bool = False) -> Measured:
    """Rows in the order of ``entries``, and of ``cases``, whose members are among them."""
    with tempfile.TemporaryDirectory() as scratch:
        return asyncio.run(_measure(entries, cases, Path(scratch), is_timed))


async def _measure(entries: Sequence[Entry], cases: Sequence[Case], scratch: Path, is_timed: bool) -> Measured:
    config = tiny_config("llama", tie_word_embeddings=True, attention_bias=True)  # linears with biases and without
    folder = save_random(config, scratch / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base = load_base(folder, dtype=torch.float32, cache_dir=scratch / "digests")
    bench = Bench(model, base.spec)
    limits = EngineConfig(
        max_model_len=128,
        max_num_seqs=len(entries) + NUM_STREAMS + sum(len(case.members) for case in cases),
        max_num_batched_tokens=NUM_TOKENS * (len(entries) + 1) + 64,
        kv_cache_bytes=64 * MIB,
        adapter_slots=len(entries) + 2,
    )
    # A step of a server computes the logits of few prompt positions; here one has to hold all probes.
    with mock.patch.object(scheduler, "MAX_ALL_ROWS", 1 << 20):
        return await _through_the_door(base, bench, entries, cases, scratch, limits, is_timed)


async def _through_the_door(
    base: BaseModel,
    bench: Bench,
    entries: Sequence[Entry],
    cases: Sequence[Case],
    scratch: Path,
    limits: EngineConfig,
    is_timed: bool,
) -> Measured:
    options: dict[str, Any] = {"limits": limits, "base_names": (BASE_NAME,), "tokenizer_conflicts": lambda tokens: []}
    async with open_runtime(base, scratch / "store", **options) as runtime:
        folders = {entry.name: entry.write(bench, scratch / entry.name) for entry in entries}
        versions = {}
        for entry in entries:
            result = await runtime.admit(folders[entry.name], entry.name, **entry.options)
            versions[entry.name] = result.record.version
        mixed = await _in_one_batch(runtime, [(_ids(each), _binding(each, versions[each.name])) for each in entries])
        rows = []
        for entry, together in zip(entries, mixed, strict=True):
            row = await _one(runtime, entry, versions[entry.name], bench, folders[entry.name], together)
            rows.append(row)
        bindings = {entry.name: _binding(entry, versions[entry.name]) for entry in entries}
        adapters = Adapters({entry.name: entry for entry in entries}, folders, bindings)
        ensembles = await measure_ensembles(runtime, bench, adapters, cases)
        if is_timed:
            rows = await _timed(runtime, rows)
    return Measured(rows, ensembles)


async def _one(runtime: TinyRuntime, entry: Entry, version: str, bench: Bench, folder: Path, together: Tensor) -> Row:
    ids, engine = _ids(entry), runtime.engine
    expected = entry.oracle(bench.model, folder, ids)
    # The base, and so every adapter at strength 0, has no tokens that an adapter adds.
    known = tuple(token for token in ids if token < runtime.base.vocab_size)
    changed = expected if known == ids else entry.oracle(bench.model, folder, known)[:, : runtime.base.vocab_size]
    plain = await _probe(engine, known, BASE_BINDING)
    alone = await _probe(engine, ids, _binding(entry, version))
    nbytes = next(adapter.device_bytes for adapter in engine.status().adapters if adapter.version == version)
    zero_bits = None
    if entry.has_strength:
        zero_bits = torch.equal(await _probe(engine, known, _binding(entry, version, 0.0)), plain)
    await evict(engine, version)
    again = await _probe(engine, ids, _binding(entry, version))
    return Row(
        entry=entry,
        effect=_distance(changed, base_logits(bench.model, known)),
        alone=_distance(alone, expected),
        mixed=_distance(together, expected),
        limit=TOLERANCE * max(1.0, float(expected.square().mean().sqrt())),
        company_bits=torch.equal(alone, together),
        zero_bits=zero_bits,
        reload_bits=torch.equal(again, alone),
        nbytes=nbytes,
    )


async def _in_one_batch(runtime: TinyRuntime, work: list[tuple[tuple[int, ...], Binding]]) -> list[Tensor]:
    """All adapters and the base in the same steps. Probes reach the engine one by one, so a round may fall apart."""
    engine = runtime.engine
    runner: Any = engine._engine._runner
    for _, binding in work:
        await engine.preload(binding.parts[0].version)
    sizes: list[int] = []
    execute = runner.execute
    runner.execute = lambda batch: sizes.append(len(batch)) or execute(batch)
    try:
        for _ in range(20):
            sizes.clear()
            base = engine.probe(work[0][0], BASE_BINDING)
            found = await asyncio.gather(base, *(engine.probe(ids, binding) for ids, binding in work))
            if sizes == [len(work) + 1]:
                return [_tensor(logits) for logits in found[1:]]
    finally:
        runner.execute = execute
    raise AssertionError(f"{len(work) + 1} probes never met in one step; the last round had steps of {sizes}")


async def _timed(runtime: TinyRuntime, rows: list[Row]) -> list[Row]:
    """Base and adapter in turns, so that a clock that drifts meets both."""
    timed: list[Row] = []
    for row in rows:
        pairs = []
        for _ in range(NUM_ROUNDS):
            base = await _step_seconds(runtime, runtime.base.spec.names[0])
            pairs.append((base, await _step_seconds(runtime, row.entry.name)))
        usual, changed = (min(column) for column in zip(*pairs, strict=True))
        timed.append(replace(row, slowdown=changed / usual - 1))
    return timed


async def _step_seconds(runtime: TinyRuntime, name: str) -> float:
    """The fastest tenth of the decode steps that ran ``NUM_STREAMS`` sequences of ``name`` at once."""
    runner: Any = runtime.engine._engine._runner
    taken: list[float] = []
    execute = runner.execute

    def timed(batch: Any) -> Any:
        started = time.perf_counter()
        logits = execute(batch)
        if len(batch) == NUM_STREAMS and all(item.num_tokens == 1 for item in batch):
            taken.append(time.perf_counter() - started)
        return logits

    runner.execute = timed
    try:
        await asyncio.gather(
            *(runtime.generate(name, [5 + index, 17, 60], NUM_DECODED) for index in range(NUM_STREAMS))
        )
    finally:
        runner.execute = execute
    return sorted(taken)[len(taken) // 10]


def _ids(entry: Entry) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(5)
    rest = torch.randint(3, 199, (NUM_TOKENS,), generator=generator).tolist()
    ids = [*entry.warm_ids, *rest][:NUM_TOKENS]
    if entry.invocation:
        ids[NUM_TOKENS // 2 : NUM_TOKENS // 2 + len(entry.invocation)] = entry.invocation
    return tuple(ids)


def _binding(entry: Entry, version: str, scale: float = 1.0) -> Binding:
    """As a request for the adapter would be bound."""
    start = start_of(_ids(entry), entry.invocation) if entry.invocation else 0
    return Binding((BindingPart(version, scale, scale, start or 0, num_token_ids=entry.num_token_ids),))


async def _probe(engine: Any, ids: tuple[int, ...], binding: Binding) -> Tensor:
    return _tensor(await engine.probe(ids, binding))


def _tensor(logits: Logits) -> Tensor:
    flat = torch.frombuffer(bytearray(logits.data), dtype=torch.float32)
    return flat.view(logits.num_tokens, logits.vocab_size)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
