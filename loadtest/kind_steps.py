"""Decode steps with adapters of one kind, beside steps without, in turns: the measuring part of ``kinds.py``."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.adapters.device_pool import DevicePool
from deltaserve.deltas.folded import FOLDED_FILE_NAME, FoldedAdapter
from deltaserve.engine.batch import PrefixFill, PrefixPart, ScheduledPart, ScheduledSequence
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache
from deltaserve_kernels import cpu
from loadtest.kind_adapters import BY_NAME, FIRST_TOKEN, PREFIX_TOKENS, Kind
from loadtest.kind_work import Work, work_of
from loadtest.paired import Pair, Run, Samples, in_pairs, seconds_of
from loadtest.small import Shape

READ_BYTES, PRODUCT_SIZE = 128 * 2**20, 1024


def base_of(shape: Shape, dtype: torch.dtype) -> BaseModel:
    """A Llama of this shape, random weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": True,
        "max_position_embeddings": shape.max_len,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_base(folder, dtype=dtype, load_format="dummy")


class Stand:
    """A base, a KV cache and tables that adapters of one kind are put into, by the server's own code.

    Slots 0..rows - 1 hold the kind's reference, if it has one; the next ``rows`` the kind.
    """

    def __init__(self, base: BaseModel, kv: KVCache, rows: int, context: int) -> None:
        self.base, self.kv, self.rows, self.context = base, kv, rows, context
        slots = 2 * rows
        self.tables = DeltaTables.of(base, slots)
        self.pool = DevicePool(self.tables, num_slots=slots, max_bytes=sys.maxsize)
        self.runner = self.new_runner()

    def new_runner(self) -> ModelRunner:
        """It keeps the lists of its last step, as in traffic: steps that take turns have one each."""
        return ModelRunner(self.base, self.kv, self.tables)

    def fill(self, kind: Kind, slots: Iterable[int]) -> tuple[Work, int]:
        """Adapters of the kind in these slots, each in memory of its own; what one is, and its bytes on the device.

        They are one file, loaded again and again: equal numbers cost what others do.
        """
        folded, nbytes = kind.make(self.base), 0
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, FOLDED_FILE_NAME)
            folded.save(path)
            for slot in slots:
                loaded = FoldedAdapter.load(path, self.base.spec, self.base.dtype)
                staged = self.pool.stage(self.pool.convert(loaded))
                self.pool.install(slot, staged)
                nbytes = staged.nbytes
        return work_of(folded, self.base), nbytes

    def step(self, slots: Sequence[int], *, has_prefix: bool = False) -> Run:
        """A decode step: row i has the adapter in ``slots[i]``, none where that is -1. One run copies prefixes."""
        blocks = -(-(self.context + PREFIX_TOKENS + 1) // BLOCK_SIZE)
        start = self.context + (PREFIX_TOKENS if has_prefix else 0)
        shared: dict[int, int] = {}  # whole blocks of a prefix lie once in the cache
        batch, first = [], []
        for row, slot in enumerate(slots):
            table = list(range(row * blocks, (row + 1) * blocks))
            if has_prefix:
                owner = shared.setdefault(slot, row)
                whole = PREFIX_TOKENS // BLOCK_SIZE
                table[:whole] = range(owner * blocks, owner * blocks + whole)
            sequence = ScheduledSequence(row, (FIRST_TOKEN + row % 64,), start, tuple(table))
            if slot >= 0:
                sequence.parts = (ScheduledPart(slot),)
            batch.append(sequence)
            copied = ScheduledSequence(row, sequence.token_ids, start, tuple(table), sequence.parts)
            copied.prefix = PrefixFill((PrefixPart(slot, 0, PREFIX_TOKENS),)) if has_prefix else None
            first.append(copied)
        runner = self.new_runner()
        runner.execute(first)
        return lambda: runner.execute(batch)


def rates() -> dict[str, float]:
    """Bytes per second of reading memory, FLOPs per second of a product in fp32: the best of several passes."""
    memory = torch.ones(READ_BYTES // 4)
    a, b = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE), torch.randn(PRODUCT_SIZE, PRODUCT_SIZE)
    read, product = (min(seconds_of(run) for _ in range(12)) for run in (memory.sum, lambda: torch.mm(a, b)))
    return {"read_bytes_per_second": READ_BYTES / read, "flops_per_second": 2 * PRODUCT_SIZE**3 / product}


def measure(
    base: BaseModel, kinds: Sequence[Kind], *, rows: int, context: int, rounds: int, seconds: float, longer: int = 1
) -> list[dict[str, Any]]:
    """An entry for each kind; at most ``rounds`` rounds, fewer where they would take more than ``seconds``; of vectors
    ``longer`` times both."""
    blocks = -(-(context + PREFIX_TOKENS + 1) // BLOCK_SIZE)
    kv = KVCache(base.kv_layout, rows * blocks, "cpu")
    few = max(1, rows // 4)
    entries = []
    for kind in kinds:
        stand = Stand(base, kv, rows, context)
        below = stand.fill(BY_NAME[kind.on], range(rows))[0] if kind.on else Work(0, 0, 0)
        whole, nbytes = stand.fill(kind, range(rows, 2 * rows))
        work = Work(*(all_of_it - others for all_of_it, others in zip(whole, below, strict=True)))
        cases = {"distinct": list(range(rows)), "shared": [row % few for row in range(rows)]}
        adapters = {"distinct": rows, "shared": few}
        plain = stand.step([-1] * rows)
        has_prefix = kind.name == "prefix"
        pairs = {
            case: Pair(
                stand.step(slots) if kind.on else plain,
                stand.step([rows + slot for slot in slots], has_prefix=has_prefix),
            )
            for case, slots in cases.items()
        }
        gc.collect()
        gc.freeze()  # as the server does
        times = longer if kind.is_vector else 1
        samples = in_pairs(pairs, times * rounds, times * seconds)
        gc.unfreeze()
        entries.append(
            {
                "name": kind.name,
                "title": kind.title,
                "on": kind.on,
                "is_vector": kind.is_vector,
                "adapter_bytes": nbytes,
                "flops_of_row": work.flops,
                "read_bytes": {c: n * work.bytes_once + rows * work.bytes_of_row for c, n in adapters.items()},
                "step_seconds": {case: found._asdict() for case, found in samples.items()},
            }
        )
        print(f"{kind.name:<10}" + "  ".join(_told(case, found) for case, found in samples.items()), flush=True)
    return entries


def _told(case: str, found: Samples) -> str:
    share = statistics.median(own / other - 1 for own, other in zip(found.own, found.reference, strict=True))
    return f"{case} {1e3 * statistics.median(found.own):7.1f} ms, {100 * share:+6.1f} %"


def instruction_set() -> str:
    return cpu.level() if cpu.is_available() else "none: PyTorch's operators"
