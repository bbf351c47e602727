"""Speed of the CPU operators: correctness first, then C++ against the PyTorch definition and a common way.

    python kernels/bench.py [cpu] [--quick] [--threads N] [--dtype bfloat16|float16|float32] [--json PATH]

Every line also shows the byte floor: bytes that any implementation must move, divided by the read rate of memory that
is measured in the same run. `common` is what one would write in PyTorch with speed in mind (cpu_baselines.py).
Adapters of several layers are cycled so that they do not stay in the caches. Times are wall clock: run it on an idle
machine, and compare only figures of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deltabench import cpu_baselines as baselines
from deltabench.machine import processor_name
from deltaserve_kernels import (
    LoraTables,
    SparseTables,
    build_work_list,
    cpu,
    lora_linear,
    paged_attention,
    sparse_linear,
)

# Widths of a 0.1 B Llama: q,k,v and gate,up are fused groups, down stands alone.
GROUPS = {"qkv": (576, (576, 192, 192)), "gate_up": (576, (1536, 1536)), "down": (1536, (576,))}
LORA_POINTS = ((1, 1, 8), (8, 8, 8), (32, 32, 8), (32, 8, 8), (32, 32, 16), (32, 32, 64), (512, 8, 8), (2048, 32, 8))
SPARSE_POINTS = ((1, 1), (8, 8), (32, 32), (512, 8))
DENSITY = 0.005
# (sequences, queries each, positions each)
ATTENTION_POINTS = ((1, 1, 1024), (32, 1, 128), (32, 1, 512), (4, 128, 128), (1, 512, 512))
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
READ_BYTES = 128 * 2**20
CYCLED_BYTES = 64 * 2**20  # twice a large cache
SLOW_SECONDS = 0.3  # a baseline call past this is timed less often


@dataclass
class Timing:
    """Microseconds per call: median, fastest, slowest, over ``rounds``."""

    median_us: float
    min_us: float
    max_us: float
    rounds: int


@dataclass
class Record:
    operator: str
    point: dict[str, int | str]
    max_error: float
    tolerance: float
    floor_bytes: int
    floor_us: float
    cpu: Timing
    reference: Timing
    common: Timing

    @property
    def over_floor(self) -> float:
        return self.cpu.median_us / self.floor_us

    @property
    def speedup(self) -> float:
        return self.common.median_us / self.cpu.median_us


class Bench:
    """Times operators at one dtype; every point is checked against the definition before it is timed."""

    def __init__(self, dtype: torch.dtype, seconds: float, cycled_bytes: int) -> None:
        self.dtype = dtype
        self.seconds = seconds
        self.cycled_bytes = cycled_bytes
        self.size = dtype.itemsize
        # Both round the same fp32 sums once; they may differ by one unit in the last place of the largest value.
        self.relative = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5)
        self.read_rate = self.measure_read_rate()

    def measure_read_rate(self) -> float:
        """Bytes per second of a reduction over memory larger than the caches; the best of several passes."""
        data = torch.ones(READ_BYTES // 4)
        timing = self.time(lambda: data.sum())
        return data.numel() * 4 / (timing.min_us * 1e-6)

    def time(self, call: Callable[[], object]) -> Timing:
        started = time.perf_counter()
        call()
        first = time.perf_counter() - started
        rounds = 3 if first > SLOW_SECONDS else max(5, min(200, int(self.seconds / max(first, 1e-6))))
        samples = []
        for _ in range(rounds):
            started = time.perf_counter()
            call()
            samples.append((time.perf_counter() - started) * 1e6)
        return Timing(statistics.median(samples), min(samples), max(samples), rounds)

    def compare(
        self,
        operator: str,
        point: dict[str, int | str],
        floor_bytes: int,
        run: Callable[[str, int], Tensor],
        num_layers: int,
    ) -> Record:
        """``run(backend, layer)`` returns the result; layers differ in their adapters only."""
        wanted = run("reference", 0).float()
        error = (run("cpu", 0).float() - wanted).abs().max().item()
        tolerance = self.relative * wanted.abs().max().item()
        if not error <= tolerance:
            raise SystemExit(f"{operator} {point}: differs from the definition by {error}, allowed {tolerance}")
        # The common way may round in between, so it only has to be the same thing.
        if not (run("common", 0).float() - wanted).abs().max().item() <= 0.02 * wanted.abs().max().item():
            raise SystemExit(f"{operator} {point}: the common way computes something else")

        def layers(backend: str, count: int) -> Timing:
            timing = self.time(lambda: [run(backend, layer) for layer in range(count)])
            return Timing(timing.median_us / count, timing.min_us / count, timing.max_us / count, timing.rounds)

        return Record(
            operator,
            point,
            error,
            tolerance,
            floor_bytes,
            floor_bytes / self.read_rate * 1e6,
            layers("cpu", num_layers),
            layers("reference", min(num_layers, 2)),
            layers("common", num_layers),
        )

    def lora(self, group: str, num_rows: int, num_adapters: int, rank: int) -> Record:
        in_features, widths = GROUPS[group]
        adapter_bytes = num_adapters * rank * sum(in_features + width for width in widths) * self.size
        num_layers = max(2, min(64, self.cycled_bytes // adapter_bytes))
        tables = LoraTables(num_layers * len(widths), num_adapters)
        for linear in range(tables.num_linears):
            for slot in range(num_adapters):
                a = torch.randn(rank, in_features) * in_features**-0.5
                tables.set(
                    linear, slot, a.to(self.dtype), torch.randn(rank, widths[linear % len(widths)]).to(self.dtype)
                )
        floor = adapter_bytes + num_rows * (in_features + 2 * sum(widths)) * self.size
        point: dict[str, int | str] = {"group": group, "T": num_rows, "G": num_adapters, "r": rank}
        common = baselines.lora(tables)
        return self._linear("lora", lora_linear, point, tables, common, in_features, widths, num_layers, floor)

    def sparse(self, group: str, num_rows: int, num_adapters: int) -> Record:
        in_features, widths = GROUPS[group]
        entries = sum(max(1, int(in_features * width * DENSITY)) for width in widths)
        adapter_bytes = num_adapters * (entries * (4 + self.size) + 4 * (sum(widths) + len(widths)))
        num_layers = max(2, min(64, self.cycled_bytes // adapter_bytes))
        tables = SparseTables(num_layers * len(widths), num_adapters)
        for linear in range(tables.num_linears):
            for slot in range(num_adapters):
                tables.set(linear, slot, *random_csr(widths[linear % len(widths)], in_features, self.dtype))
        floor = adapter_bytes + num_rows * (in_features + 2 * sum(widths)) * self.size
        point: dict[str, int | str] = {"group": group, "T": num_rows, "G": num_adapters, "density": str(DENSITY)}
        num_layers = min(num_layers, 8)  # dense deltas are large enough to leave the caches with few layers
        common = baselines.sparse(tables, in_features)
        return self._linear("sparse", sparse_linear, point, tables, common, in_features, widths, num_layers, floor)

    def _linear(
        self,
        operator: str,
        function: Callable[..., None],
        point: dict[str, int | str],
        tables: LoraTables | SparseTables,
        common: baselines.AddLinear,
        in_features: int,
        widths: tuple[int, ...],
        num_layers: int,
        floor_bytes: int,
    ) -> Record:
        num_rows, num_adapters = int(point["T"]), int(point["G"])
        share = num_rows // num_adapters
        work = build_work_list([((row // share, 1.0, 1.0),) for row in range(num_rows)])
        adapters = torch.arange(num_rows) // share
        groups = [slice(slot * share, (slot + 1) * share) for slot in range(num_adapters)]
        x = torch.randn(num_rows, in_features).to(self.dtype)
        y = torch.zeros(num_rows, sum(widths), dtype=self.dtype)
        starts = [sum(widths[:i]) for i in range(len(widths))]
        members = [
            [(layer * len(widths) + i, starts[i], starts[i] + widths[i]) for i in range(len(widths))]
            for layer in range(num_layers)
        ]

        def run(backend: str, layer: int) -> Tensor:
            y.zero_()
            if backend == "common":
                for linear, start, stop in members[layer]:
                    y[:, start:stop] += common(linear, x, adapters, groups)
            else:
                function(y, x, work, tables, members[layer], 0.0, backend=backend)
            return y

        return self.compare(operator, point, floor_bytes, run, num_layers)

    def attention(self, num_seqs: int, num_queries: int, num_positions: int) -> Record:
        blocks = -(-num_positions // 16)
        cache_bytes = num_seqs * blocks * 16 * KV_HEADS * HEAD_DIM * 2 * self.size
        num_layers = max(2, min(32, self.cycled_bytes // cache_bytes))
        pool = torch.randn(num_seqs * blocks, num_layers, 2, KV_HEADS, 16, HEAD_DIM).to(self.dtype)
        table = torch.randperm(num_seqs * blocks).to(torch.int32).view(num_seqs, blocks)
        starts = torch.arange(0, num_seqs * num_queries + 1, num_queries, dtype=torch.int32)
        lens = torch.full((num_seqs,), num_positions, dtype=torch.int32)
        q = torch.randn(num_seqs * num_queries, HEADS, HEAD_DIM).to(self.dtype)

        common = baselines.attention(q, pool, table, num_positions)

        def run(backend: str, layer: int) -> Tensor:
            if backend == "common":
                return common(layer)
            k_cache, v_cache = pool[:, layer, 0], pool[:, layer, 1]
            return paged_attention(q, k_cache, v_cache, table, starts, lens, scale=HEAD_DIM**-0.5, backend=backend)

        floor = cache_bytes + 2 * q.numel() * self.size
        point: dict[str, int | str] = {"S": num_seqs, "queries": num_queries, "positions": num_positions}
        return self.compare("attention", point, floor, run, num_layers)


def random_csr(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """CSR of DENSITY * size entries at random places."""
    count = max(1, int(in_features * out_features * DENSITY))
    places = torch.randperm(in_features * out_features)[:count].sort().values
    indptr = torch.zeros(out_features + 1, dtype=torch.int32)
    indptr[1:] = torch.bincount(places // in_features, minlength=out_features).cumsum(0)
    return indptr, (places % in_features).to(torch.int32), torch.randn(count).to(dtype)


def show(record: Record) -> None:
    point = " ".join(f"{key}={value}" for key, value in record.point.items())
    spread = f"[{record.cpu.min_us:.0f}-{record.cpu.max_us:.0f}]"
    print(
        f"{record.operator:<10}{point:<36}{record.reference.median_us:>10.0f}{record.common.median_us:>9.0f}"
        f"{record.cpu.median_us:>9.1f} {spread:<13}"
        f"{record.floor_us:>8.1f}{record.over_floor:>7.2f}{record.speedup:>8.1f}x",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few points, few rounds: shows that it runs, no figures")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="write one JSON record here")
    args = parser.parse_args(argv)
    if not cpu.is_available():
        sys.exit(f"nothing to compare: {cpu.unavailable_reason()}")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    bench = Bench(getattr(torch, args.dtype), *((0.02, 2**20) if args.quick else (1.0, CYCLED_BYTES)))
    print(
        f"{args.dtype}, {args.threads} thread(s), {cpu.level()}, memory read {bench.read_rate / 1e9:.1f} GB/s; "
        "microseconds per call: median [fastest-slowest]"
    )
    head = f"{'operator':<10}{'point':<36}{'reference':>10}{'common':>9}{'cpu':>9} {'':<13}{'floor':>8}{'/floor':>7}"
    print(f"{head}{'common/cpu':>11}")
    calls: list[Callable[[], Record]] = []
    for group in list(GROUPS)[:1] if args.quick else GROUPS:
        calls += [partial(bench.lora, group, *p) for p in (LORA_POINTS[1:3] if args.quick else LORA_POINTS)]
    for group in list(GROUPS)[:1] if args.quick else GROUPS:
        calls += [partial(bench.sparse, group, *p) for p in (SPARSE_POINTS[:2] if args.quick else SPARSE_POINTS)]
    calls += [partial(bench.attention, *p) for p in (ATTENTION_POINTS[1:2] if args.quick else ATTENTION_POINTS)]
    records = []
    for call in calls:
        records.append(call())
        show(records[-1])
    if args.json:
        summary = {
            "benchmark": "kernels",
            "quick": args.quick,
            "machine": {
                "processor": processor_name(),
                "architecture": platform.machine(),
                "system": f"{platform.system()} {platform.release()}",
                "instruction_set": cpu.level(),
                "threads": args.threads,
                "read_bytes_per_second": bench.read_rate,
            },
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "dtype": args.dtype,
            "records": [
                {**asdict(record), "over_floor": record.over_floor, "speedup": record.speedup} for record in records
            ],
        }
        args.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
