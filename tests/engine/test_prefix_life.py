"""Random life with prefixes on a model without weights: whatever is shared, preempted, evicted or reloaded, each
sequence reads its own adapters' virtual tokens before its own tokens, in their order, and nothing else."""

from __future__ import annotations

import random

import torch

from deltaserve.adapters.delta_tables import DeltaTables
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
from deltaserve.engine.prefix_fill import copy_prefixes, passes
from deltaserve.engine.sampler import Sampler
from deltaserve.engine.scheduler import Scheduler
from deltaserve_kernels import LoraTables, PrefixTables
from deltatest.engine_fakes import FINGERPRINT, LINEAR, VOCAB, FakeLoader, FakeRunner, adapter, request, row_logits

NUM_BLOCKS, NUM_SLOTS = 16, 4
GIVEN = {"p1": 1, "p15": 15, "p16": 16, "p40": 40}
EMBEDDED = {"e3": 3, "e17": 17}
LENGTHS = {**GIVEN, **EMBEDDED}
CONTENTS = {**{name: 100.0 + index for index, name in enumerate(LENGTHS)}, "a": 1.0, "b": 2.0}
COMPOSED = (
    ("p15", "a"),
    ("p1", "p16"),
    ("p16", "p1"),
    ("p1", "p40"),
    ("e17", "p1"),
    ("p1", "e17"),
    ("e17", "e3"),
    ("b", "e17"),
    ("e17", "b", "p15"),
    ("a", "p16", "e3", "b"),
)
Active = tuple[tuple[float, float, float], ...]
Place = tuple[int, Active]
"""What a position of the fake model holds: a token (negative: a virtual one), and what its row was adapted by."""


class Loader(FakeLoader):
    """Prefixes whose first number is the adapter's content."""

    def load(self, version: str) -> FoldedAdapter:
        if version not in LENGTHS:
            return adapter(CONTENTS[version])
        count = LENGTHS[version]
        pages = torch.full((1, -(-count // 16), 1, 2, 1, 16, 1), CONTENTS[version])
        embeddings = torch.full((count, 1), CONTENTS[version]) if version in EMBEDDED else None
        return FoldedAdapter({}, FINGERPRINT, torch.float32, prefix=PrefixTerm(pages, count, embeddings))


class Runner(FakeRunner):
    """Writes what virtual token i of an adapter is to its position, as far as the step says that it is missing: what
    is copied by what lands in a pool, what is run by the sequence's parts."""

    def __init__(self, tables: LoraTables, prefixes: PrefixTables) -> None:
        super().__init__(NUM_BLOCKS, tables)
        self.prefixes = prefixes
        self.num_run = 0

    def execute(self, batch: list[ScheduledSequence]) -> torch.Tensor:
        for item in batch:
            if item.prefix is not None:
                self._copy(item)
        for virtual, embeddings in passes(batch, self.prefixes):
            rows = iter(embeddings[:, 0].tolist())
            for item in virtual:
                for position in range(item.start, item.stop):
                    self.kv[self._index(item, position)] = run(next(rows), self._active(item, position), position)
                    self.num_run += 1
        return super().execute(batch)

    def _active(self, item: ScheduledSequence, position: int) -> Active:
        active = (part for part in item.parts if part.start_position <= position)
        return tuple((self._content(part.slot), part.scale_first, part.scale_last) for part in active)

    def _copy(self, item: ScheduledSequence) -> None:
        assert item.prefix is not None
        pool = torch.zeros(NUM_BLOCKS, 1, 2, 1, 16, 1)
        copy_prefixes([item], self.prefixes, pool)
        for part in item.prefix.parts:
            for position in range(max(part.start, item.prefix.first_block * 16), part.stop):
                if not part.is_run:
                    content = float(pool[item.block_table[position // 16], 0, 0, 0, position % 16, 0])
                    self.kv[self._index(item, position)] = copied(content, position - part.start)


def copied(content: float, index: int) -> Place:
    return -1 - index, ((content, 1.0, 1.0),)


def run(content: float, active: Active, position: int) -> Place:
    return -1000 - position, ((content, 1.0, 1.0), *active)


def expected(prompt: tuple[int, ...], versions: tuple[str, ...], num_tokens: int) -> list[int]:
    active: Active = tuple((CONTENTS[version], 1.0, 1.0) for version in versions if version not in LENGTHS)
    seen: list[Place] = []
    for version in versions:
        is_run = version in EMBEDDED and bool(seen or active)
        for index in range(LENGTHS.get(version, 0)):
            content = CONTENTS[version]
            seen.append(run(content, active, len(seen)) if is_run else copied(content, index))
    seen += [(token, active) for token in prompt]
    out: list[int] = []
    while len(out) < num_tokens:
        out.append(int(row_logits(seen).argmax()))
        seen.append((out[-1], active))
    return out


def test_random_life() -> None:
    lora, prefixes = LoraTables(1, NUM_SLOTS, "cpu"), PrefixTables(NUM_SLOTS)
    tables = DeltaTables(lora, prefixes=prefixes, linears=[LINEAR])
    pool = DevicePool(tables, num_slots=NUM_SLOTS, max_bytes=2000)
    residency = AdapterResidency(pool, HostCache(2000), Loader(CONTENTS))
    limits = EngineLimits(
        max_model_len=160, max_num_seqs=6, max_num_batched_tokens=24, max_queue=1000, vocab_size=VOCAB
    )
    blocks = BlockManager(NUM_BLOCKS, FINGERPRINT)
    scheduler = Scheduler(blocks, residency, limits, patience_seconds=0.01, prefixes=prefixes)
    runner = Runner(lora, prefixes)
    engine = Engine(runner, residency, blocks, scheduler, Sampler(VOCAB), limits)
    rng = random.Random(3)
    heads = [tuple(rng.randrange(VOCAB) for _ in range(60)) for _ in range(2)]
    waiting: list[GenerationRequest] = []
    for number in range(90):
        prompt = (*heads[number % 2][: rng.randrange(1, 50)], rng.randrange(VOCAB))
        versions = rng.choice([(), *((name,) for name in CONTENTS), *COMPOSED, *COMPOSED])
        options = {"max_tokens": rng.randrange(1, 40), "n": rng.choice([1, 1, 2])}
        waiting.append(request(f"r{number}", prompt, *versions, **options))
    tokens = {entry.request_id: [[] for _ in range(entry.n)] for entry in waiting}
    wanted, num_preempted, aborted = {entry.request_id: entry for entry in waiting}, 0, set()
    num_cached = 0
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
            num_cached += output.num_cached_tokens
            for delta in output.deltas:
                tokens[output.request_id][delta.index] += delta.token_ids
    assert num_preempted > 0
    assert num_cached > 0
    assert runner.num_run > 0
    assert blocks.num_used == 0
    for request_id, entry in wanted.items():
        for found in tokens[request_id]:
            full = expected(entry.prompt_ids, entry.binding.versions, entry.sampling.max_tokens)
            assert found == full[: len(found)], entry.binding.versions
            assert len(found) == len(full) or request_id in aborted
