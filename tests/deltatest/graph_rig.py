"""A base with decode graphs beside an eager runner over a cache of the same content; random adapters and steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.decode_graphs import DecodeGraphs
from deltaserve.engine.graph_capture import Pass
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model.base import BaseModel
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache
from deltaserve_kernels import (
    ACTIVATIONS,
    EMBEDDING,
    HEAD,
    ApartEntries,
    ApartFamily,
    BlockTables,
    LoraTables,
    PaddedLayout,
    RotationEntry,
    RotationFactor,
    RowsEntry,
    SparseTables,
    VectorEntries,
    VectorEntry,
    VectorFamily,
    VocabularyEntries,
    VocabularyFamily,
)
from deltatest.apart_cases import full, module, packed
from deltatest.block_cases import listed
from deltatest.kernel_cases import csr, randn
from deltatest.mask_cases import mask

NUM_SLOTS = 5
LONGEST_TABLE = 6  # blocks of a sequence; all sequences of the largest step have blocks of their own


def rerun(run: Pass) -> Pass:
    """A ``Capture``: the pass itself, run once as a capture would."""
    run()
    return run


class GraphRig:
    """``capture`` defaults to running the same pass again. Slots: any of low-rank, sparse, both or nothing; with
    ``has_vectors`` also scales, biases and norms ("vectors"), input scales of linears that share theirs ("fed") and
    rotations of one factor ("rotations") or several ("factors"), in slot 0 alone, so that one part turns a row;
    with ``has_blocks`` row and column blocks ("blocks"); with ``has_apart`` dense differences ("dense") and modules at
    attach points ("modules"): slot 0 alone has modules, so that a binding has one at a point; with ``has_vocabulary``
    low rank and trained rows of embedding and head ("vocabulary"), tokens beyond the base's among them ("added")."""

    def __init__(
        self,
        base: BaseModel,
        *,
        capture: Any = None,
        capture_now: bool = True,
        seed: int = 0,
        max_seqs: int = 6,
        has_vectors: bool = False,
        has_blocks: bool = False,
        has_apart: bool = False,
        has_vocabulary: bool = False,
        **options: Any,
    ) -> None:
        self.base = base
        self.draw = random.Random(seed)
        self.num_captures = 0
        self._capture = capture or rerun
        device = base.device
        self.lora = LoraTables(len(base.linears), NUM_SLOTS, device)
        self.sparse = SparseTables(len(base.linears), NUM_SLOTS, device)
        self.vectors = VectorFamily(len(base.linears), len(base.norms), NUM_SLOTS, device) if has_vectors else None
        self.blocks = BlockTables(len(base.linears), NUM_SLOTS, device) if has_blocks else None
        self.apart = ApartFamily(len(base.linears), len(base.points), NUM_SLOTS, device) if has_apart else None
        self.vocabulary = VocabularyFamily(NUM_SLOTS, device) if has_vocabulary else None
        self.tables = DeltaTables(self.lora, self.sparse, self.vectors, self.apart, self.vocabulary, self.blocks)
        self.num_blocks = max(40, LONGEST_TABLE * max(options.get("row_counts") or [max_seqs]))
        self.kv = KVCache(base.kv_layout, self.num_blocks, device, has_scratch=True)
        self.kv.pool.normal_(generator=torch.Generator(device).manual_seed(seed))
        self.graphs = DecodeGraphs(
            base,
            self.kv,
            self.tables,
            max_seqs=max_seqs,
            max_blocks=8,
            capture=self._count,
            **options,
        )
        if capture_now:
            self.graphs.capture()
        self.eager_kv = KVCache(base.kv_layout, self.num_blocks, device)
        self.eager = self.new_runner()

    def new_runner(self) -> ModelRunner:
        """Over the same tables, without graphs, and the cache that is a copy."""
        return ModelRunner(self.base, self.eager_kv, self.tables)

    def _count(self, run: Pass) -> Pass:
        self.num_captures += 1
        replay: Pass = self._capture(run)
        return replay

    # ------------------------------------------------------------ adapters

    def change_adapters(self) -> None:
        """Empty some slots and fill some, with terms of other kinds, ranks and targets than before."""
        kinds: list[tuple[str, ...]] = [(), ("lora",), ("sparse",), ("lora", "sparse")]
        if self.vectors is not None:
            kinds += [("vectors",), ("vectors", "fed"), ("lora", "vectors"), ("lora", "sparse", "vectors", "fed")]
        turning = [] if self.vectors is None else [("rotations",), ("lora", "vectors", "fed", "rotations", "factors")]
        if self.blocks is not None:
            kinds += [("blocks",), ("lora", "blocks")]
        if self.apart is not None:
            kinds += [("dense",), ("lora", "dense")]
        if self.vocabulary is not None:
            everything = (*self.graphs.families, *(() if self.apart is None else ("dense",)))
            everything = tuple(name for name in everything if name not in ("rotations", "factors", "added"))
            kinds += [("vocabulary",), ("lora", "vocabulary"), everything, ("vocabulary", "added")]
        of_slot_0 = [] if self.apart is None else [("modules",), ("dense", "modules"), ("lora", "modules")]
        of_slot_0 += turning
        for slot in range(NUM_SLOTS):
            if self.draw.random() < 0.4:
                self.clear(slot)
                self.fill(slot, self.draw.choice(kinds if slot else kinds + 3 * of_slot_0))

    def clear(self, slot: int) -> None:
        self.tables.clear(slot)

    def fill_apart(self, slot: int, families: Sequence[str], targets: Sequence[int], share: float = 0.7) -> None:
        """Differences of some targets, full, packed or masks, and modules at some points, some of them parallel."""
        if self.apart is None:
            raise ValueError("a rig without has_apart")
        seed, dtype, size = self.draw.randrange(1 << 20), self.base.dtype, self.base.spec.hidden_size
        dense, modules = [], []
        for linear in targets if "dense" in families else ():
            spec = self.base.spec.linears[self.base.linears[linear]]
            shape = (spec.out_features, spec.in_features)
            form = self.draw.choice([partial(full, dtype=dtype), packed, mask])
            dense.append((linear, form(*shape, seed=seed + linear)))
        for point, name in enumerate(self.base.points) if "modules" in families else ():
            if self.draw.random() < share and name in self.base.spec.points:
                reads = point - 1 if name.endswith(("attn_out", "mlp_out")) and self.draw.random() < 0.5 else -1
                phi, rank = self.draw.choice(list(ACTIVATIONS)), self.draw.choice([1, 4, 9])
                has_biases = self.draw.random() < 0.5
                options = {"has_biases": has_biases, "reads": reads, "dtype": dtype}
                modules.append((point, module(size, rank, phi, seed + 7 * point, **options)))
        self.apart.set_all(slot, ApartEntries(tuple(dense), tuple(modules)).to(self.base.device))

    def fill_block(self, slot: int, linear: int) -> None:
        """Listed rows, listed columns or both."""
        if self.blocks is None:
            raise ValueError("a rig without has_blocks")
        spec = self.base.spec.linears[self.base.linears[linear]]
        seed, which = self.draw.randrange(1 << 20), self.draw.choice(["rows", "columns", "both"])
        rows = listed(spec.out_features, None if which == "columns" else self.draw.choice([1, 9]), seed)
        cols = listed(spec.in_features, None if which == "rows" else self.draw.choice([1, 9]), seed + 1)
        shape = (spec.out_features if rows is None else len(rows), spec.in_features if cols is None else len(cols))
        d = randn(*shape, dtype=self.base.dtype, seed=seed, scale=0.2)
        device = self.base.device
        d, rows, cols = (
            None if t is None else t.to(device) for t in (d.t().contiguous() if rows is None else d, rows, cols)
        )
        self.blocks.set(linear, slot, d, spec.in_features, spec.out_features, out_rows=rows, in_cols=cols)

    def fill_vectors(self, slot: int, targets: Sequence[int], families: Sequence[str], share: float = 0.7) -> None:
        """Scales and biases of some targets' outputs, differences of some norms, scales of some inputs; with "fed" of
        inputs that several linears share too. "rotations": of such inputs and of outputs, each of some."""
        if self.vectors is None:
            raise ValueError("a rig without has_vectors")
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 30))

        def vector(size: int, mean: float) -> torch.Tensor:
            return (mean + 0.2 * torch.randn(size, generator=generator)).to(self.base.device)

        def pair(size: int, mean: float, has_bias: bool = True) -> VectorEntry:
            which = self.draw.choice([(1, 0), (0, 1), (1, 1)]) if has_bias else (1, 0)
            return VectorEntry(vector(size, mean) if which[0] else None, vector(size, 0.0) if which[1] else None)

        specs = [self.base.spec.linears[name] for name in self.base.linears]
        alone = {group[0] for group in self.base.groups() if len(group) == 1}
        may_feed = [i for i in targets if "fed" in families or self.base.linears[i] in alone]
        in_turns, out_turns = (
            [
                (i, self._rotation(getattr(specs[i], size), "factors" in families))
                for i in some
                if "rotations" in families and self.draw.random() < share
            ]
            for some, size in ((may_feed, "in_features"), (targets, "out_features"))
        )
        if "vectors" not in families:
            self.vectors.set_all(slot, VectorEntries((), (), (), tuple(in_turns), tuple(out_turns)))
            return
        outputs = [(i, pair(specs[i].out_features, 1.0)) for i in targets]
        inputs = [(i, pair(specs[i].in_features, 1.0, has_bias=False)) for i in may_feed if self.draw.random() < share]
        norms = [
            (i, pair(self.base.norm(name)[0].numel(), 0.0, self.base.norm(name)[1] is not None))
            for i, name in enumerate(self.base.norms)
            if self.draw.random() < share
        ]
        entries = (tuple(some) for some in (outputs, inputs, norms, in_turns, out_turns))
        self.vectors.set_all(slot, VectorEntries(*entries))

    def _rotation(self, width: int, has_several: bool) -> RotationEntry:
        """Blocks of 4 or 8 that differ, or one that all share; of places as they are, or in another order."""
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 30))
        factors = []
        for _ in range(self.draw.choice([2, 3]) if has_several else 1):
            size = self.draw.choice([4, 8])
            blocks = randn(self.draw.choice([1, width // size]), size, size, seed=generator.initial_seed(), scale=0.1)
            order = self.draw.choice([None, torch.randperm(width, generator=generator).int().to(self.base.device)])
            factors.append(RotationFactor(blocks.to(self.base.device, self.base.dtype), order))
        return tuple(factors)

    def fill_vocabulary(self, slot: int, num_added: int = 0) -> None:
        """Low rank and trained rows, each of the embedding, the head or both; with tokens beyond the base's rows of
        both."""
        if self.vocabulary is None:
            raise ValueError("a rig without has_vocabulary")
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 30))
        vocab, width = self.base.vocab_size, self.base.hidden_size

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return (0.1 * torch.randn(rows, columns, generator=generator)).to(self.base.device, self.base.dtype)

        def rows() -> RowsEntry:
            known = sorted(self.draw.sample(range(vocab), vocab // 2))
            ids = torch.tensor([*known, *range(vocab, vocab + num_added)], dtype=torch.int32)
            return RowsEntry(ids.to(self.base.device), matrix(len(ids), width))

        which = [self.draw.choice([(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)]) for _ in range(2)]
        if num_added:
            which[1] = (EMBEDDING, HEAD)
        sizes = {EMBEDDING: (vocab, width), HEAD: (width, vocab)}
        low_rank = tuple((m, matrix(3, sizes[m][0]), matrix(3, sizes[m][1])) for m in which[0])
        self.vocabulary.set_all(slot, VocabularyEntries(low_rank, tuple((m, rows()) for m in which[1])))

    def fill(self, slot: int, families: Sequence[str], rank: int | None = None, share: float = 0.7) -> None:
        """``rank`` None: a random one for each linear; ``share`` of the linears get terms."""
        generator = torch.Generator().manual_seed(self.draw.randrange(1 << 30))
        device, dtype = self.base.device, self.base.dtype
        targets = [i for i in range(len(self.base.linears)) if self.draw.random() < share]
        if {"vectors", "rotations"} & set(families):
            self.fill_vectors(slot, targets, families, share=share)
        if "dense" in families or "modules" in families:
            self.fill_apart(slot, families, targets, share)
        if "vocabulary" in families:
            self.fill_vocabulary(slot, self.draw.choice([1, 5]) if "added" in families else 0)
        for linear in targets:
            spec = self.base.spec.linears[self.base.linears[linear]]
            out_features, in_features = spec.out_features, spec.in_features
            if "blocks" in families:
                self.fill_block(slot, linear)
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
