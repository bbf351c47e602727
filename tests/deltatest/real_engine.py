"""The real engine (model, runner, sampler, residency) stepped by hand, with adapters from memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.adapters.device_pool import DevicePool
from deltaserve.adapters.host_cache import HostCache
from deltaserve.adapters.residency import AdapterResidency
from deltaserve.core import GenerationRequest
from deltaserve.deltas.fold import fold
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.engine.batch import ScheduledSequence
from deltaserve.engine.block_manager import BlockManager
from deltaserve.engine.decode_graphs import DecodeGraphs
from deltaserve.engine.engine import Engine
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.engine.sampler import Sampler
from deltaserve.engine.scheduler import Scheduler
from deltaserve.model.base import BaseModel
from deltaserve.model.kv_cache import KVCache
from deltaserve_store.formats import read_adapter


@dataclass
class RecordingRunner:
    """The real runner; keeps each sequence's last logits row of every step that had one, by sequence id."""

    runner: ModelRunner
    rows: dict[int, list[Tensor]] = field(default_factory=dict)
    max_step_seqs: int = 0

    def execute(self, batch: Sequence[ScheduledSequence]) -> Tensor:
        logits = self.runner.execute(batch)
        self.max_step_seqs = max(self.max_step_seqs, len(batch))
        offset = 0
        for item in batch:
            offset += {"none": 0, "last": 1, "all": item.num_tokens}[item.logits]
            if item.logits != "none":
                self.rows.setdefault(item.seq_id, []).append(logits[offset - 1].clone())
        return logits


@dataclass
class RealRig:
    engine: Engine
    runner: RecordingRunner
    residency: AdapterResidency
    num_preempted: int = 0
    max_distinct_adapters: int = 0

    def run(self, *requests: GenerationRequest) -> dict[str, list[list[int]]]:
        """Steps until all are done, checking the books; tokens by request id and sequence index."""
        tokens: dict[str, list[list[int]]] = {}
        for request in requests:
            self.engine.check(request)
            self.engine.add(request, self.engine.clock())
            tokens[request.request_id] = [[] for _ in range(request.n)]
        while self.engine.open_ids:
            outcome = self.engine.step()
            self.engine.check_integrity()
            for _, error in outcome.failures:
                raise error
            for output in outcome.outputs:
                for delta in output.deltas:
                    tokens[output.request_id][delta.index] += delta.token_ids
            if outcome.stats is not None:
                self.num_preempted += outcome.stats.num_preempted
                self.max_distinct_adapters = max(self.max_distinct_adapters, outcome.stats.num_distinct_adapters)
        return tokens


@dataclass
class MemoryLoader:
    adapters: Mapping[str, FoldedAdapter]

    def load(self, version: str) -> FoldedAdapter:
        return self.adapters[version]


def real_rig(
    base: BaseModel,
    adapters: Mapping[str, FoldedAdapter] | None = None,
    *,
    num_blocks: int = 256,
    num_slots: int = 16,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 256,
    has_graphs: bool = False,
) -> RealRig:
    tables = DeltaTables.of(base, num_slots)
    pool = DevicePool(tables, num_slots=num_slots, max_bytes=1 << 30, device=base.device)
    residency = AdapterResidency(pool, HostCache(1 << 30), MemoryLoader(adapters or {}))
    limits = EngineLimits(
        max_model_len=min(base.max_context, num_blocks * 16),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue=4096,
        vocab_size=base.vocab_size,
    )
    blocks = BlockManager(num_blocks, base.spec.fingerprint)
    kv = KVCache(base.kv_layout, num_blocks, base.device, has_scratch=has_graphs)
    # What blocks held before must not matter.
    kv.pool.normal_(generator=torch.Generator(base.device).manual_seed(1))
    kv_regime = base.kv_regime if base.has_kv_regimes else None
    scheduler = Scheduler(
        blocks, residency, limits, kv_regime=kv_regime, patience_seconds=0.05, prefixes=tables.prefixes
    )
    graphs = None
    if has_graphs:  # each a pass that is run again; wants the reference operators
        few = DeltaTables(tables.lora, tables.sparse)  # rows with other terms run eagerly
        graphs = DecodeGraphs(base, kv, few, max_seqs=max_num_seqs, capture=lambda run: run)
        graphs.capture()
    inner = ModelRunner(base, kv, tables, graphs=graphs)
    runner = RecordingRunner(inner)
    engine = Engine(runner, residency, blocks, scheduler, Sampler(base.vocab_size), limits)
    return RealRig(engine, runner, residency)


def fold_folder(folder: Path, base: BaseModel) -> FoldedAdapter:
    """An adapter folder, read and folded as admission does it."""
    return fold(read_adapter(folder, base.spec), base.spec, base.dtype, base)
