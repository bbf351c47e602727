"""A model without weights for engine tests: its "KV cache" holds what each position was computed from.

``FakeRunner`` writes, for each token it computes, the token and the adapter contents that the tables hold for its
parts; a row of logits is a function of everything its sequence's block table shows up to that position. So a block
shared wrongly, a stale table, a lost position or a slot reused too early changes the tokens that come out.
``expected_tokens`` is the same function without blocks, slots or batches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.adapters.device_pool import DevicePool
from deltaserve.adapters.host_cache import HostCache
from deltaserve.adapters.residency import AdapterResidency
from deltaserve.core import Binding, BindingPart, GenerationRequest, SamplingParams
from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve.engine.batch import ScheduledSequence
from deltaserve.engine.block_manager import BlockManager
from deltaserve.engine.engine import Engine
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.outcome import Outcome
from deltaserve.engine.sampler import Sampler
from deltaserve.engine.scheduler import Scheduler
from deltaserve_kernels import LoraTables, SparseTables

VOCAB = 53
LINEAR = "layer.0.linear"
ADAPTER_BYTES = 64
FINGERPRINT = "f" * 64

Part = tuple[float, float, float]
Tokens = dict[str, list[list[int]]]


def adapter(content: float) -> FoldedAdapter:
    """64 bytes whose only meaning is ``content``."""
    a = torch.full((1, 8), content, dtype=torch.float32)
    return FoldedAdapter({LINEAR: (LowRankTerm(a, torch.zeros(1, 8)),)}, FINGERPRINT, torch.float32)


def row_logits(positions: Sequence[tuple[int, tuple[Part, ...]]]) -> np.ndarray:
    """Logits [VOCAB] after a sequence of (token, active parts as (content, scale_first, scale_last))."""
    seed = hash(tuple(positions)) & 0xFFFFFFFF
    return np.random.RandomState(seed).randn(VOCAB).astype(np.float32) * 3


def expected_tokens(
    prompt: Sequence[int], parts: Sequence[tuple[float, BindingPart]], num_tokens: int, stops: Sequence[int] = ()
) -> list[int]:
    """Greedy completion of one sequence alone; ``parts`` pairs each part with its adapter's content."""
    seen: list[tuple[int, tuple[Part, ...]]] = []
    out: list[int] = []

    def add(token: int) -> None:
        position = len(seen)
        active = tuple(
            (content, part.scale_first, part.scale_last) for content, part in parts if part.start_position <= position
        )
        seen.append((token, active))

    for token in prompt:
        add(token)
    while len(out) < num_tokens:
        token = int(row_logits(seen).argmax())
        if token in stops:
            break
        out.append(token)
        add(token)
    return out


class FakeRunner:
    """See the module. ``before_step`` may sleep or raise; ``num_steps`` counts calls."""

    def __init__(self, num_blocks: int, tables: LoraTables, before_step: Callable[[], None] | None = None) -> None:
        self.kv: list[tuple[int, tuple[Part, ...]] | None] = [None] * (num_blocks * 16)
        self.tables = tables
        self.before_step = before_step
        self.num_steps = 0
        self.max_step_tokens = 0

    def execute(self, batch: list[ScheduledSequence]) -> torch.Tensor:
        self.num_steps += 1
        self.max_step_tokens = max(self.max_step_tokens, sum(item.num_tokens for item in batch))
        if self.before_step is not None:
            self.before_step()
        rows = [row for item in batch for row in self._run(item)]
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, VOCAB)

    def _run(self, item: ScheduledSequence) -> list[np.ndarray]:
        for offset, token in enumerate(item.token_ids):
            position = item.start + offset
            active = tuple(
                (self._content(part.slot), part.scale_first, part.scale_last)
                for part in item.parts
                if part.start_position <= position
            )
            self.kv[self._index(item, position)] = (token, active)
        if item.logits == "none":
            return []
        stops = range(item.start + 1, item.stop + 1) if item.logits == "all" else [item.stop]
        return [row_logits([self.kv[self._index(item, p)] for p in range(stop)]) for stop in stops]  # type: ignore[misc]

    def _index(self, item: ScheduledSequence, position: int) -> int:
        return item.block_table[position // 16] * 16 + position % 16

    def _content(self, slot: int) -> float:
        entry = self.tables.get(0, slot)
        if entry is None:
            raise RuntimeError(f"slot {slot} is used but empty")
        return float(entry[0][0, 0])


@dataclass
class FakeLoader:
    """Contents by version; ``delays`` in seconds and ``errors`` by version; ``gates`` block a load until set."""

    contents: Mapping[str, float]
    delays: dict[str, float] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    threads: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)

    def load(self, version: str) -> FoldedAdapter:
        self.threads.add(threading.current_thread().name)
        self.loads.append(version)
        if version in self.gates and not self.gates[version].wait(10):
            raise TimeoutError("the gate was never opened")
        time.sleep(self.delays.get(version, 0.0))
        if version in self.errors:
            raise self.errors[version]
        return adapter(self.contents[version])


@dataclass
class Rig:
    """An engine on fakes and all its parts."""

    engine: Engine
    runner: FakeRunner
    loader: FakeLoader
    residency: AdapterResidency
    blocks: BlockManager
    scheduler: Scheduler

    def run(self, *requests: GenerationRequest, max_steps: int = 5000, check: bool = True) -> Tokens:
        """Add the requests, step until all are done; tokens by request id and sequence index."""
        for request in requests:
            self.engine.check(request)
            self.engine.add(request, self.engine.clock())
        return self.finish({r.request_id: r.n for r in requests}, max_steps=max_steps, check=check)

    def finish(self, counts: Mapping[str, int], *, max_steps: int = 5000, check: bool = True) -> Tokens:
        tokens: Tokens = {key: [[] for _ in range(n)] for key, n in counts.items()}
        for _ in range(max_steps):
            if not self.engine.open_ids:
                return tokens
            outcome = self.engine.step()
            if check:
                self.engine.check_integrity()
            collect(outcome, tokens)
            if outcome.failures:
                raise outcome.failures[0][1]
            if outcome.stats is None:
                time.sleep(0.001)
        raise AssertionError(f"not finished after {max_steps} steps: {self.engine.open_ids}")


def collect(outcome: Outcome, tokens: Tokens) -> None:
    for output in outcome.outputs:
        for delta in output.deltas:
            if output.request_id in tokens:
                tokens[output.request_id][delta.index] += delta.token_ids


def make_rig(
    *,
    contents: Mapping[str, float] | None = None,
    num_blocks: int = 64,
    num_slots: int = 4,
    host_adapters: int = 64,
    device_adapters: int | None = None,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 256,
    max_queue: int = 1024,
    patience_seconds: float = 0.02,
    retry_seconds: float = 5.0,
    num_load_threads: int = 1,
    kv_regime: Callable[[int], int] | None = None,
) -> Rig:
    """``host_adapters`` and ``device_adapters``: byte budgets in adapters of ``ADAPTER_BYTES``."""
    loader = FakeLoader(contents or {})
    lora, sparse = LoraTables(1, num_slots, "cpu"), SparseTables(1, num_slots, "cpu")
    tables = DeltaTables(lora, sparse, linears=[LINEAR])
    pool = DevicePool(tables, num_slots=num_slots, max_bytes=ADAPTER_BYTES * (device_adapters or num_slots))
    residency = AdapterResidency(
        pool,
        HostCache(ADAPTER_BYTES * host_adapters),
        loader,
        retry_seconds=retry_seconds,
        num_load_threads=num_load_threads,
    )
    limits = EngineLimits(
        max_model_len=min(max_model_len, num_blocks * 16),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue=max_queue,
        vocab_size=VOCAB,
        max_parts=num_slots,
    )
    blocks = BlockManager(num_blocks, FINGERPRINT)
    scheduler = Scheduler(blocks, residency, limits, kv_regime=kv_regime, patience_seconds=patience_seconds)
    runner = FakeRunner(num_blocks, lora)
    engine = Engine(runner, residency, blocks, scheduler, Sampler(VOCAB), limits)
    return Rig(engine, runner, loader, residency, blocks, scheduler)


def request(
    request_id: str,
    prompt: Sequence[int],
    *versions: str,
    max_tokens: int = 8,
    temperature: float = 0.0,
    n: int = 1,
    binding: Binding | None = None,
    eos: Sequence[int] = (),
    tenant: str = "default",
    cache_salt: str = "",
    deadline_seconds: float | None = None,
    **sampling: object,
) -> GenerationRequest:
    """A request; ``versions`` make a binding at scale 1."""
    return GenerationRequest(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=temperature, **sampling),  # type: ignore[arg-type]
        binding=binding or Binding(tuple(BindingPart(version) for version in versions)),
        n=n,
        eos_token_ids=tuple(eos),
        tenant=tenant,
        cache_salt=cache_salt,
        deadline_seconds=deadline_seconds,
    )
