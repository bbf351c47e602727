"""The smallest real engine a proof can use: one sequence at a time through ``ModelRunner``, without any scheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.adapters.device_pool import DevicePool
from deltaserve.core import Binding, Logits
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.engine.batch import PrefixFill, PrefixPart, ScheduledPart, ScheduledSequence
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model.base import BaseModel
from deltaserve.model.kv_cache import KVCache
from deltaserve_store.names import NameMap


class SerialEngine:
    """Has the part of ``AsyncEngine`` that admission uses. ``on_probe`` may change or fail what a probe answers."""

    def __init__(self, base: BaseModel, names: NameMap | None = None) -> None:
        self.base = base
        self.names = names or NameMap(base_names=base.spec.names)
        self.limits = EngineLimits(
            max_model_len=min(128, base.max_context),
            max_num_seqs=1,
            max_num_batched_tokens=128,
            max_queue=1,
            vocab_size=base.vocab_size,
        )
        self.candidates: dict[str, Path] = {}
        self.on_probe: Callable[[Binding, torch.Tensor], torch.Tensor] | None = None
        self.num_probes = 0
        self.published: list[NameMap] = []
        self._tables = DeltaTables.of(base, 1)
        self._pool = DevicePool(self._tables, num_slots=1, max_bytes=1 << 30)
        self._runner = ModelRunner(base, KVCache(base.kv_layout, 8, base.device), self._tables)

    def publish(self, names: NameMap) -> None:
        self.names = names
        self.published.append(names)

    def register_candidate(self, version: str, folded_path: Path) -> None:
        self.candidates[version] = folded_path

    def unregister_candidate(self, version: str) -> None:
        del self.candidates[version]

    async def probe(self, ids: tuple[int, ...], binding: Binding) -> Logits:
        self.num_probes += 1
        parts: tuple[ScheduledPart, ...] = ()
        if binding.parts:
            (part,) = binding.parts
            path = self.candidates[part.version]
            self._install(FoldedAdapter.load(path, self.base.spec, self.base.dtype))
            parts = (ScheduledPart(0, part.scale_first, part.scale_last),)
        start = self._tables.prefixes.num_tokens(0) if parts else 0
        blocks = list(range(1 + (start + len(ids) - 1) // 16))
        prefix = PrefixFill((PrefixPart(0, 0, start),)) if start else None
        seq = ScheduledSequence(0, ids, start, blocks, () if start else parts, logits="all", prefix=prefix)
        logits = self._runner.execute([seq])
        if self.on_probe is not None:
            logits = self.on_probe(binding, logits)
        return Logits(len(ids), logits.shape[1], logits.contiguous().numpy().tobytes())

    def _install(self, adapter: FoldedAdapter) -> None:
        if not self._pool.num_free_slots:
            self._pool.release(0)
        staged = self._pool.convert(adapter)
        self._pool.install(self._pool.reserve("candidate", staged.nbytes), staged)
