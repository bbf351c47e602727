"""A base with decode graphs beside an eager runner over a cache of the same content; random adapters and steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.decode_graphs import DecodeGraphs
from deltaserve.engine.graph_capture import Pass
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model.base import BaseModel
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache
from deltaserve_kernels import LoraTables, PaddedLayout, SparseTables
from deltatest.kernel_cases import csr

NUM_SLOTS = 5
LONGEST_TABLE = 6  # blocks of a sequence; all sequences of the largest step have blocks of their own


def rerun(run: Pass) -> Pass:
    """A ``Capture``: the pass itself, run once as a capture would."""
    run()
    return run


class GraphRig:
    """``capture`` defaults to running the same pass again. Slots: any of low-rank, sparse, both or nothing."""

    def __init__(
        self,
        base: BaseModel,
        *,
        capture: Any = None,
        capture_now: bool = True,
        seed: int = 0,
        max_seqs: int = 6,
        **options: Any,
    ) -> None:
        self.base = base
        self.draw = random.Random(seed)
        self.num_captures = 0
        self._capture = capture or rerun
        device = base.device
        self.lora = LoraTables(len(base.linears), NUM_SLOTS, device)
        self.sparse = SparseTables(len(base.linears), NUM_SLOTS, device)
        self.num_blocks = max(40, LONGEST_TABLE * max(options.get("row_counts") or [max_seqs]))
        self.kv = KVCache(base.kv_layout, self.num_blocks, device, has_scratch=True)
        self.kv.pool.normal_(generator=torch.Generator(device).manual_seed(seed))
        self.graphs = DecodeGraphs(
            base, self.kv, self.lora, self.sparse, max_seqs=max_seqs, max_blocks=8, capture=self._count, **options
        )
        if capture_now:
            self.graphs.capture()
        self.eager_kv = KVCache(base.kv_layout, self.num_blocks, device)
        self.eager = ModelRunner(base, self.eager_kv, self.lora, self.sparse)

    def _count(self, run: Pass) -> Pass:
        self.num_captures += 1
        replay: Pass = self._capture(run)
        return replay

    # ------------------------------------------------------------ adapters

    def change_adapters(self) -> None:
        """Empty some slots and fill some, with terms of other kinds, ranks and targets than before."""
        for slot in range(NUM_SLOTS):
            if self.draw.random() < 0.4:
                self.lora.clear(slot)
                self.sparse.clear(slot)
                self.fill(slot, self.draw.choice([(), ("lora",), ("sparse",), ("lora", "sparse")]))

    def fill(self, slot: int, families: Sequence[str], rank: int | None = None, share: float = 0.7) -> None:
        """``rank`` None: a random one for each linear; ``share`` of the linears get terms."""
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 30))
        device, dtype = self.base.device, self.base.dtype
        targets = [i for i in range(len(self.base.linears)) if self.draw.random() < share]
        for linear in targets:
            spec = self.base.spec.linears[self.base.linears[linear]]
            out_features, in_features = spec.out_features, spec.in_features
            if "lora" in families:
                r = rank or self.draw.choice([1, 2, 8, 17])
                a = torch.randn(r, in_features, generator=generator) * 0.1
                b_t = torch.randn(r, out_features, generator=generator) * 0.1
                self.lora.set(linear, slot, a.to(device, dtype), b_t.to(device, dtype))
            if "sparse" in families:
                mask = torch.rand(out_features, in_features, generator=generator) < 0.02
                values = (torch.randn(int(mask.sum()), generator=generator) * 0.2).to(dtype)
                self.sparse.set(linear, slot, *(tensor.to(device) for tensor in csr(mask, values)))

    # ------------------------------------------------------------ steps

    def random_batch(self, num_rows: int | None = None, *, max_parts: int = 2) -> list[ScheduledSequence]:
        """Decoding sequences of random lengths over disjoint blocks, some of the base, some with several parts."""
        num_rows = num_rows or self.draw.randint(1, self.graphs.row_counts[-1])
        free = list(range(self.num_blocks))
        self.draw.shuffle(free)
        batch = []
        for i in range(num_rows):
            start = self.draw.choice([0, 1, 15, 16, self.draw.randrange(LONGEST_TABLE * BLOCK_SIZE)])
            table = [free.pop() for _ in range(start // BLOCK_SIZE + 1)]
            token = self.draw.randrange(self.base.vocab_size)
            batch.append(ScheduledSequence(i, [token], start, table, self.random_parts(start, max_parts)))
        # A list of the largest step holds so many parts; the rest of the rows get one each.
        room = PaddedLayout(self.graphs.row_counts[-1]).num_parts - num_rows
        for seq in batch:
            room -= max(0, len(seq.parts) - 1)
            if room < 0:
                seq.parts = seq.parts[:1]
        return batch

    def random_parts(self, start: int, max_parts: int) -> tuple[ScheduledPart, ...]:
        slots = self.draw.sample(range(NUM_SLOTS), self.draw.randint(0, max_parts))
        return tuple(
            ScheduledPart(slot, self.draw.choice([1.0, -0.5]), 2.0, self.draw.choice([0, 0, start, start + 1]))
            for slot in slots
        )

    def check(self, batch: Sequence[ScheduledSequence], name: str = "") -> None:
        """The graph's logits and what it wrote to the cache equal the eager runner's, bit for bit."""
        self.eager_kv.pool.copy_(self.kv.pool[: self.num_blocks])
        wanted = self.eager.execute(batch)
        found = self.graphs.run(batch)
        assert found is not None, f"{name}: no graph serves the step"
        assert torch.equal(found, wanted), f"{name}: logits differ by {(found - wanted).abs().max():.2e}"
        assert torch.equal(self.kv.pool[: self.num_blocks], self.eager_kv.pool), f"{name}: the cache differs"
