"""A whole decode step on the CPU: the base alone, beside LoRA, beside sparse deltas, in turns of one process.

    python kernels/bench.py step [--rows N] [--rank R] [--rounds N] [--threads N] [--out FOLDER]

Base and adapters are random, of the shape "small" (0.1 B parameters); adapters lie in memory as the server's loader
puts them there. What adapters add is the median of differences between neighbouring steps, held against the bytes they
are and the rate at which this very run reads memory. Run it on an idle machine; figures of two runs do not compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltabench import machine, step_adapters
from deltabench.points import uniform
from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.adapters.device_pool import DevicePool
from deltaserve.deltas.folded import FOLDED_FILE_NAME, FoldedAdapter, LowRankTerm, SparseTerm, Term
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache
from deltaserve_kernels import LoraTables, SparseTables, cpu

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 16384,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
DENSITY = 0.005
READ_BYTES = 128 * 2**20


def main(arguments: Sequence[str], shape: Mapping[str, Any] = SMALL) -> int:
    given = _arguments().parse_args(arguments)
    torch.manual_seed(given.seed)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(dict(shape)), encoding="utf-8")
        base = load_base(folder, dtype=getattr(torch, given.dtype), load_format="dummy")
    record = measure(base, given)
    text = render(record)
    print(text)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "cpu-step.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (given.out / "cpu-step.md").write_text(text, encoding="utf-8")
    return 0


def measure(base: BaseModel, given: argparse.Namespace) -> dict[str, Any]:
    """Steps of each kind in turns, and between them a pass over memory; milliseconds."""
    point = uniform(given.rows, given.rows, given.rank)
    empty = (LoraTables(len(base.linears), given.rows), SparseTables(len(base.linears), given.rows))
    lora, _ = as_served(base, step_adapters.lora_tables(base, point))
    _, sparse = as_served(base, step_adapters.sparse_tables(base, point, DENSITY))
    blocks = -(-(given.context + 1) // BLOCK_SIZE)
    kv = KVCache(base.kv_layout, given.rows * blocks, "cpu")
    memory = torch.ones(READ_BYTES // 4)

    def step(tables: tuple[LoraTables, SparseTables], has_adapters: bool) -> Callable[[], object]:
        runner = ModelRunner(base, kv, DeltaTables(*tables))
        batch = [
            ScheduledSequence(
                row,
                (5 + row,),
                given.context,
                tuple(range(row * blocks, (row + 1) * blocks)),
                parts=(ScheduledPart(row),) if has_adapters else (),
            )
            for row in range(given.rows)
        ]
        return lambda: runner.execute(batch)

    kinds: dict[str, Callable[[], object]] = {
        "base": step(empty, False),
        "lora": step((lora, empty[1]), True),
        "sparse": step((empty[0], sparse), True),
        "read": memory.sum,
    }
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_number in range(given.rounds + 2):
        for kind, run in kinds.items():
            started = time.perf_counter()
            run()
            if round_number >= 2:  # the first two warm up
                samples[kind].append((time.perf_counter() - started) * 1e3)
    rate = READ_BYTES / (statistics.median(samples["read"]) * 1e-3)
    bytes_of = {"lora": _bytes(lora), "sparse": _bytes(sparse)}
    return {
        "benchmark": "cpu-step",
        "taken_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {**machine.describe(base.device), "instruction_set": cpu.level(), "threads": given.threads},
        "versions": machine.versions(),
        "commit": machine.commit(),
        "seed": given.seed,
        "dtype": given.dtype,
        "rows": given.rows,
        "context": given.context,
        "rank": given.rank,
        "density": DENSITY,
        "rounds": given.rounds,
        "read_bytes_per_second": rate,
        "step_ms": {kind: _spread(values) for kind, values in samples.items() if kind != "read"},
        "added": {
            kind: {
                "bytes": bytes_of[kind],
                "floor_ms": bytes_of[kind] / rate * 1e3,
                "added_ms": _spread([a - b for a, b in zip(samples[kind], samples["base"], strict=True)]),
            }
            for kind in bytes_of
        },
    }


def as_served(base: BaseModel, drawn: LoraTables | SparseTables) -> tuple[LoraTables, SparseTables]:
    """Tables with the adapters of ``drawn`` in the same slots, in memory as the server has them: written to folded
    files, loaded and installed by its own code."""
    lora, sparse = LoraTables(len(base.linears), drawn.num_slots), SparseTables(len(base.linears), drawn.num_slots)
    tables = DeltaTables(lora, sparse, linears=base.linears)
    pool = DevicePool(tables, num_slots=drawn.num_slots, max_bytes=sys.maxsize)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FOLDED_FILE_NAME)
        for slot in range(drawn.num_slots):
            entries = {name: drawn.get(index, slot) for index, name in enumerate(base.linears)}
            terms = {name: (_term(entry),) for name, entry in entries.items() if entry is not None}
            FoldedAdapter(terms=terms, base_fingerprint=base.spec.fingerprint, dtype=base.dtype).save(path)
            pool.install(slot, pool.stage(pool.convert(FoldedAdapter.load(path, base.spec, base.dtype))))
    return lora, sparse


def _term(entry: tuple[Tensor, ...]) -> Term:
    return LowRankTerm(*entry) if len(entry) == 2 else SparseTerm(*entry)


def _bytes(tables: LoraTables | SparseTables) -> int:
    """Bytes of every matrix that the operators read, at true rank or as stored entries."""
    entries = (tables.get(linear, slot) for linear in range(tables.num_linears) for slot in range(tables.num_slots))
    return sum(part.numel() * part.element_size() for entry in entries if entry is not None for part in entry[:3])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def render(record: Mapping[str, Any]) -> str:
    """The record as a page."""
    found, base = record["machine"], record["step_ms"]["base"]["median"]
    lines = [
        f"Decode step of {record['rows']} rows at {record['context']} positions, {record['dtype']}, every row its own "
        f"adapter on all linears; {record['rounds']} rounds, median [least–greatest]. Taken {record['taken_at']} on "
        f"{found['processor']} ({found['instruction_set']}, {found['threads']} threads, reading "
        f"{record['read_bytes_per_second'] / 1e9:.1f} GB/s in this run), torch {record['versions']['torch']}; seed "
        f"{record['seed']}.",
        "",
        "| step | ms | added ms | of the base step | byte floor ms | added / floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| base alone | {_shown(record['step_ms']['base'])} | | | | |",
    ]
    names = {"lora": f"LoRA, rank {record['rank']}", "sparse": f"sparse, {100 * record['density']:g} %"}
    for kind, name in names.items():
        added = record["added"][kind]
        extra, floor = added["added_ms"]["median"], added["floor_ms"]
        lines.append(
            f"| {name} | {_shown(record['step_ms'][kind])} | {_shown(added['added_ms'])} | {100 * extra / base:.0f} % "
            f"| {floor:.1f} | {extra / floor:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _shown(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.1f} [{spread['min']:.1f}–{spread['max']:.1f}]"


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--context", type=int, default=128, help="positions before the step")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for cpu-step.json and cpu-step.md")
    return parser
