"""Random life with prefixes on a model without weights: whatever is shared, preempted, evicted or reloaded, each
sequence reads its own adapter's virtual tokens before its own tokens, and nothing else."""

from __future__ import annotations

import random

import numpy as np
import torch

from deltaserve.adapters.device_pool import DevicePool
from deltaserve.adapters.host_cache import HostCache
from deltaserve.adapters.residency import AdapterResidency
from deltaserve.core import GenerationRequest
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.deltas.prefixes import PrefixTerm
from deltaserve.engine.batch import ScheduledSequence
from deltaserve.engine.block_manager import BlockManager
from deltaserve.engine.engine import Engine
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.sampler import Sampler
from deltaserve.engine.scheduler import Scheduler
from deltaserve_kernels import LoraTables, PrefixTables, SparseTables
from deltatest.engine_fakes import FINGERPRINT, LINEAR, VOCAB, FakeLoader, FakeRunner, adapter, request, row_logits

NUM_BLOCKS, NUM_SLOTS = 15, 3
LENGTHS = {"p1": 1, "p15": 15, "p16": 16, "p17": 17, "p40": 40}
CONTENTS = {**{name: 100.0 + length for name, length in LENGTHS.items()}, "a": 1.0, "b": 2.0}


class Loader(FakeLoader):
    """Prefixes whose first number is the adapter's content."""

    def load(self, version: str) -> FoldedAdapter:
        if version not in LENGTHS:
            return adapter(CONTENTS[version])
        pages = torch.full((1, -(-LENGTHS[version] // 16), 1, 2, 1, 16, 1), CONTENTS[version])
        return FoldedAdapter({}, FINGERPRINT, torch.float32, prefix=PrefixTerm(pages, LENGTHS[version]))


class Runner(FakeRunner):
    """Writes what virtual token i of an adapter is to position i, as far as the step says that it is missing."""

    def __init__(self, tables: LoraTables, prefixes: PrefixTables) -> None:
        super().__init__(NUM_BLOCKS, tables)
        self.prefixes = prefixes

    def _run(self, item: ScheduledSequence) -> list[np.ndarray]:
        if item.prefix is not None:
            pool = torch.zeros(NUM_BLOCKS, 1, 2, 1, 16, 1)
            self.prefixes.copy(item.prefix.slot, pool, item.block_table, item.prefix.first_block)
            content = float(pool[item.block_table[item.prefix.first_block]].max())
            for position in range(item.prefix.first_block * 16, self.prefixes.num_tokens(item.prefix.slot)):
                self.kv[self._index(item, position)] = virtual(content, position)
        return super()._run(item)


def virtual(content: float, position: int) -> tuple[int, tuple[tuple[float, float, float], ...]]:
    return -1 - position, ((content, 1.0, 1.0),)


def expected(prompt: tuple[int, ...], version: str | None, num_tokens: int) -> list[int]:
    seen = [virtual(CONTENTS[version], i) for i in range(LENGTHS[version])] if version in LENGTHS else []
    active = ((CONTENTS[version], 1.0, 1.0),) if version is not None and version not in LENGTHS else ()
    seen += [(token, active) for token in prompt]
    out: list[int] = []
    while len(out) < num_tokens:
        out.append(int(row_logits(seen).argmax()))
        seen.append((out[-1], active))
    return out


def test_random_life() -> None:
    lora, prefixes = LoraTables(1, NUM_SLOTS, "cpu"), PrefixTables(NUM_SLOTS)
    pool = DevicePool(
        [LINEAR], lora, SparseTables(1, NUM_SLOTS, "cpu"), num_slots=NUM_SLOTS, max_bytes=1000, prefixes=prefixes
    )
    residency = AdapterResidency(pool, HostCache(1000), Loader(CONTENTS))
    limits = EngineLimits(
        max_model_len=160, max_num_seqs=6, max_num_batched_tokens=24, max_queue=1000, vocab_size=VOCAB
    )
    blocks = BlockManager(NUM_BLOCKS, FINGERPRINT)
    scheduler = Scheduler(blocks, residency, limits, patience_seconds=0.01, prefixes=prefixes)
    engine = Engine(Runner(lora, prefixes), residency, blocks, scheduler, Sampler(VOCAB), limits)
    rng = random.Random(3)
    heads = [tuple(rng.randrange(VOCAB) for _ in range(60)) for _ in range(2)]
    waiting: list[GenerationRequest] = []
    for number in range(50):
        prompt = (*heads[number % 2][: rng.randrange(1, 60)], rng.randrange(VOCAB))
        version = rng.choice([None, *CONTENTS])
        options = {"max_tokens": rng.randrange(1, 40), "n": rng.choice([1, 1, 2])}
        waiting.append(request(f"r{number}", prompt, *([version] if version else []), **options))
    tokens = {entry.request_id: [[] for _ in range(entry.n)] for entry in waiting}
    wanted, num_preempted, aborted = {entry.request_id: entry for entry in waiting}, 0, set()
    while waiting or engine.open_ids:
        while waiting and rng.random() < 0.4:
            entry = waiting.pop()
            limits.check(entry)
            engine.add(entry, engine.clock())
        if engine.open_ids and rng.random() < 0.01:
            chosen = rng.choice(engine.open_ids)
            aborted.add(chosen)
            engine.abort(chosen)
        outcome = engine.step()
        engine.check_integrity()
        assert not outcome.failures
        num_preempted += outcome.stats.num_preempted if outcome.stats else 0
        for output in outcome.outputs:
            for delta in output.deltas:
                tokens[output.request_id][delta.index] += delta.token_ids
    assert num_preempted > 0
    assert blocks.num_used == 0
    for request_id, entry in wanted.items():
        version = entry.binding.versions[0] if entry.binding.parts else None
        for found in tokens[request_id]:
            full = expected(entry.prompt_ids, version, entry.sampling.max_tokens)
            assert found == full[: len(found)]
            assert len(found) == len(full) or request_id in aborted
