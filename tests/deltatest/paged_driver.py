"""Drives a ModelRunner without the engine: a block allocator, chunked prefill inside a token budget, greedy choice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.engine.batch import ScheduledSequence
from deltaserve.engine.model_runner import NO_TABLES, ModelRunner
from deltaserve.model.base import BaseModel
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache


@dataclass
class Running:
    """A sequence being decoded; ``arrival`` is the step at which it joins."""

    prompt: list[int]
    arrival: int = 0
    parts: tuple[Any, ...] = ()
    tokens: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    computed: int = 0
    regime: int = 0


class PagedDriver:
    """One base with its own cache; blocks are handed out in random order, so that no table is contiguous."""

    def __init__(self, base: BaseModel, tables: DeltaTables = NO_TABLES, *, num_blocks: int = 64) -> None:
        self.base = base
        kv = KVCache(base.kv_layout, num_blocks, base.device)
        self.runner = ModelRunner(base, kv, tables)
        # Whatever is left over from earlier use must not matter.
        self.runner.kv.pool.normal_(generator=torch.Generator(base.device).manual_seed(1))
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)

    def grow(self, sequence: Running, length: int) -> None:
        while len(sequence.table) * BLOCK_SIZE < length:
            sequence.table.append(self.free.pop())

    def release(self, sequence: Running) -> None:
        self.free.extend(sequence.table)
        sequence.table, sequence.computed = [], 0

    def greedy(self, sequences: Sequence[Running], num_tokens: int, *, budget: int = 1 << 30) -> list[list[int]]:
        """Decode ``num_tokens`` for each, all in the same steps: decodes first, then prefill chunks in the budget."""
        for sequence in sequences:
            sequence.tokens = list(sequence.prompt)
        step = 0
        while True:
            open_ = [s for s in sequences if len(s.tokens) < len(s.prompt) + num_tokens]
            if not open_:
                return [s.tokens[len(s.prompt) :] for s in sequences]
            self._step([s for s in open_ if s.arrival <= step], budget)
            for s in sequences:
                if s.table and len(s.tokens) == len(s.prompt) + num_tokens:
                    self.release(s)
            step += 1

    def _step(self, sequences: list[Running], budget: int) -> None:
        batch, owners = [], []
        for s in sorted(sequences, key=lambda s: len(s.tokens) - s.computed):
            regime = self.base.kv_regime(len(s.tokens))
            if regime != s.regime:
                self.release(s)
                s.regime = regime
            stop = min(len(s.tokens), s.computed + budget)
            if stop == s.computed:
                continue
            budget -= stop - s.computed
            self.grow(s, stop)
            is_whole = stop == len(s.tokens)
            batch.append(
                ScheduledSequence(
                    len(batch),
                    s.tokens[s.computed : stop],
                    s.computed,
                    s.table,
                    s.parts,
                    "last" if is_whole else "none",
                    len(s.tokens),
                )
            )
            s.computed = stop
            if is_whole:
                owners.append(s)
        if batch:
            chosen = self.runner.execute(batch).argmax(dim=-1).tolist()
            for s, token in zip(owners, chosen, strict=True):
                s.tokens.append(token)

    def logits(self, ids: Sequence[Sequence[int]], parts: Sequence[Any] = (), *, chunk: int = 1 << 30) -> list[Tensor]:
        """Float32 [T, vocab] of each sequence, computed together in chunks of at most ``chunk`` tokens."""
        sequences = [Running(list(tokens), parts=p) for tokens, p in zip(ids, parts or [()] * len(ids), strict=True)]
        rows: list[list[Tensor]] = [[] for _ in sequences]
        while any(s.computed < len(s.prompt) for s in sequences):
            batch, places = [], []
            for i, s in enumerate(sequences):
                stop = min(len(s.prompt), s.computed + chunk)
                if stop > s.computed:
                    self.grow(s, stop)
                    tokens = s.prompt[s.computed : stop]
                    batch.append(ScheduledSequence(i, tokens, s.computed, s.table, s.parts, "all", len(s.prompt)))
                    places.append(i)
                    s.computed = stop
            pieces = self.runner.execute(batch).split([seq.num_tokens for seq in batch])
            for i, piece in zip(places, pieces, strict=True):
                rows[i].append(piece)
        for s in sequences:
            self.release(s)
        return [torch.cat(pieces) for pieces in rows]
