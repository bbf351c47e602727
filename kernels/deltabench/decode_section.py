"""Times whole decode steps of a model with random weights: captured graphs, the host's part, and eager launches.

The base is loaded as the server loads it (``load_format`` "dummy"), adapters go straight into the pointer tables, steps
run through the server's own ``DecodeGraphs``. Every step is held to the PyTorch definition of the operators before it
is timed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deltabench import floors
from deltabench.floors import ModelShape, Rates
from deltabench.journal import Budget, Journal
from deltabench.kernel_section import DEVICE_LOST
from deltabench.points import Plan, Point, uniform
from deltabench.step_adapters import adapter_width, lora_tables, sparse_tables
from deltabench.step_capture import CountingCapture, HostCapture
from deltabench.timing import CaptureFailed, is_alive, timed_passes
from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.decode_graphs import DecodeGraphs
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.kv_cache import BLOCK_SIZE, KVCache
from deltaserve_kernels import LoraTables, SparseTables, use_backend

# Largest relative distance (L2) of a step's logits from those of the definition: rounding alone, 32 layers deep.
TOLERANCES = {torch.bfloat16: 0.1, torch.float32: 1e-4}
EAGER_ROUNDS = 5
SPARSE_POINTS = ((16, 16), (64, 64))


def model_config(shape: ModelShape) -> dict[str, Any]:
    """``config.json`` of a Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


class DecodeSection:
    def __init__(self, plan: Plan, device: torch.device, rates: Rates, journal: Journal, budget: Budget) -> None:
        self.plan, self.device, self.rates, self.journal, self.budget = plan, device, rates, journal, budget
        self.is_gpu = device.type == "cuda"
        # The host multiplies tiny matrices: there is nothing to gain from 16 bits.
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32
        self.blocks_per_sequence = -(-(plan.context + 1) // BLOCK_SIZE)
        self.base_ms: dict[int, float] = {}
        self.base_nodes: dict[int, int | None] = {}

    @cached_property
    def base(self) -> BaseModel:
        with tempfile.TemporaryDirectory(prefix="deltabench-base-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(model_config(self.plan.shape)), encoding="utf-8")
            return load_base(folder, dtype=self.dtype, device=self.device, load_format="dummy")

    @cached_property
    def kv(self) -> KVCache:
        rows = max(point.rows for point in self.plan.step)
        kv = KVCache(self.base.kv_layout, rows * self.blocks_per_sequence, self.device, has_scratch=True)
        kv.pool.normal_()
        return kv

    def lora(self) -> None:
        use_backend(self._backend)
        for rows in sorted({point.rows for point in self.plan.step} | ({64} if self.is_gpu else set())):
            self._try(f"base T={rows}", partial(self._base, rows))
        for point in self.plan.step:
            self._try(point.name, partial(self._lora, point))
        busiest = max(self.plan.step, key=lambda one: (one.rows == 64) - one.ranks[0] / 1000)
        self._try(f"{busiest.name} on q, v", partial(self._lora, busiest, ("q_proj", "v_proj")))

    def sparse(self) -> None:
        use_backend(self._backend)
        points = [uniform(rows, adapters, 0) for rows, adapters in SPARSE_POINTS] if self.is_gpu else self.plan.sparse
        for point in points:
            self._try(f"sparse {point.name}", partial(self._sparse, point))

    @property
    def _backend(self) -> str:
        return "triton" if self.is_gpu else "reference"

    def _try(self, name: str, measure: Callable[[], None]) -> None:
        key = f"step {name}"
        if self.journal.is_done(key):
            return
        if self.budget.is_over:
            self.journal.add("step", key, "skipped", {"point": name}, "the section's time is over")
            return
        self.journal.start(key)
        if self.is_gpu:
            torch.cuda.empty_cache()  # adapters and graphs of the step before
        try:
            measure()
        except Exception as error:
            self.journal.add("step", key, "failed", {"point": name}, f"{type(error).__name__}: {str(error)[:300]}")
            if isinstance(error, CaptureFailed) or not is_alive(self.device):
                raise SystemExit(DEVICE_LOST) from error

    # ------------------------------------------------------------ what is measured

    def _base(self, rows: int) -> None:
        graphs, capture = self._graphs(rows, None, None)
        batch = self.batch(rows, 0)
        found = self._times(graphs, capture, batch, None, None)
        self.base_ms[rows], self.base_nodes[rows] = found["graph_ms"], found["nodes"]
        floor = floors.step_base_seconds(self.plan.shape, rows, self.rates)
        with_kv = floor + floors.step_kv_seconds(self.plan.shape, rows, self.plan.context + 1, self.rates)
        found |= {
            "floor_ms": with_kv * 1e3,
            "floor_without_kv_ms": floor * 1e3,
            "over_floor": found["graph_ms"] / (with_kv * 1e3),
        }
        self._add(f"base T={rows}", {"T": rows, "G": 0}, found)

    def _lora(self, point: Point, only: Sequence[str] = ()) -> None:
        tables = lora_tables(self.base, point, only)
        name = f"{point.name} on q, v" if only else point.name
        shape = self.plan.shape
        if only:
            per_layer = (
                point.adapters * point.ranks[0] * adapter_width(self.base, only) * shape.itemsize / self.rates.copy
            )
        else:
            per_layer = floors.layer_lora_seconds(shape, point.rows, point.all_ranks, self.rates)
        graphs, capture = self._graphs(point.rows, tables, None)
        self._adapters(name, point, graphs, capture, (tables, None), per_layer)
        if only or point.rows != 64 or len(point.ranks) != 1 or point.ranks[0] != 16:
            return
        batch = self.batch(point.rows, 0)
        found = self._times(graphs, capture, batch, tables, None)
        found["over_base"] = found["graph_ms"] / self._base_of(point.rows)
        self._add(f"base rows on an adapter server, T={point.rows}", {"T": point.rows, "G": 0}, found)
        one = Point("(64,1,16), one row of 64", point.rows, 1, point.ranks)
        self._adapters(one.name, one, graphs, capture, (tables, None), None, self.batch(point.rows, 1, adapter_rows=1))

    def _sparse(self, point: Point) -> None:
        tables = sparse_tables(self.base, point, self.plan.density)
        shape, density = self.plan.shape, self.plan.density
        per_layer = floors.layer_sparse_seconds(shape, point.rows, point.adapters, density, self.rates)
        graphs, capture = self._graphs(point.rows, None, tables)
        self._adapters(f"sparse {point.name}", point, graphs, capture, (None, tables), per_layer)

    def _adapters(
        self,
        name: str,
        point: Point,
        graphs: DecodeGraphs,
        capture: CountingCapture | HostCapture,
        tables: tuple[LoraTables | None, SparseTables | None],
        layer_floor: float | None,
        batch: list[ScheduledSequence] | None = None,
    ) -> None:
        """Times a step with adapters and compares it with the base's; ``layer_floor`` seconds, None if not told."""
        found = self._times(graphs, capture, batch or self.batch(point.rows, point.adapters), *tables)
        base_ms = self._base_of(point.rows)
        nodes, base_nodes = found["nodes"], self.base_nodes.get(point.rows)
        found |= {
            "base_ms": base_ms,
            "added_ms": found["graph_ms"] - base_ms,
            "overhead": found["graph_ms"] / base_ms - 1.0,
            "nodes_per_layer": None if not nodes or not base_nodes else (nodes - base_nodes) / self.plan.shape.layers,
        }
        if layer_floor is not None:
            base_floor = floors.step_base_seconds(self.plan.shape, point.rows, self.rates)
            added = layer_floor * self.plan.shape.layers
            found |= {
                "floor_ms": added * 1e3,
                "over_floor": found["added_ms"] / (added * 1e3),
                "floor_overhead": added / base_floor,
            }
        self._add(name, {**point.describe()}, found)

    def _base_of(self, rows: int) -> float:
        """Milliseconds of the base's step, measured if no earlier process of this run has told it here."""
        if rows not in self.base_ms:
            graphs, capture = self._graphs(rows, None, None)
            found = self._times(graphs, capture, self.batch(rows, 0), None, None)
            self.base_ms[rows], self.base_nodes[rows] = found["graph_ms"], found["nodes"]
        return self.base_ms[rows]

    def _add(self, name: str, about: dict[str, Any], found: dict[str, Any]) -> None:
        distance, allowed = found["error"], found["allowed"]
        fields = {**about, "point": name, "context": self.plan.context + 1, **found}
        if distance <= allowed:
            self.journal.add("step", f"step {name}", "ok", fields)
        else:
            why = f"logits differ from the definition's by {distance:.2e} (relative)"
            self.journal.add("step", f"step {name}", "wrong", fields, why)

    # ------------------------------------------------------------ steps

    def batch(self, rows: int, adapters: int, adapter_rows: int | None = None) -> list[ScheduledSequence]:
        """Decoding sequences of ``context`` positions over blocks of their own; the first ``adapter_rows`` (all by
        default) have adapters."""
        per = self.blocks_per_sequence
        with_adapter = rows if adapter_rows is None else adapter_rows
        return [
            ScheduledSequence(
                row,
                [row * 7 % self.base.vocab_size],
                self.plan.context,
                list(range(row * per, (row + 1) * per)),
                (ScheduledPart(row % adapters),) if adapters and row < with_adapter else (),
            )
            for row in range(rows)
        ]

    def _graphs(
        self, rows: int, lora: LoraTables | None, sparse: SparseTables | None
    ) -> tuple[DecodeGraphs, CountingCapture | HostCapture]:
        capture = CountingCapture(self.device) if self.is_gpu else HostCapture()
        largest = 1 if lora is None else max(16, *(lora.largest_rank(slot) for slot in range(lora.num_slots)))
        graphs = DecodeGraphs(
            self.base,
            self.kv,
            DeltaTables(lora, sparse),
            max_seqs=rows,
            max_blocks=self.blocks_per_sequence,
            max_rank=largest,
            row_counts=[rows],
            capture=capture,
        )
        graphs.capture()
        return graphs, capture

    def _times(
        self,
        graphs: DecodeGraphs,
        capture: CountingCapture | HostCapture,
        batch: list[ScheduledSequence],
        lora: LoraTables | None,
        sparse: SparseTables | None,
    ) -> dict[str, Any]:
        """Milliseconds of the replay alone, of a whole run, of eager launches; distance from the definition."""
        runner = ModelRunner(self.base, self.kv, DeltaTables(lora, sparse))
        previous = use_backend("reference")
        wanted = runner.execute(batch).clone()
        use_backend(previous)
        logits = graphs.run(batch)
        if logits is None:
            raise RuntimeError("no graph serves the step")
        error = float((logits - wanted).norm() / wanted.norm().clamp(min=1e-30))
        replay = capture.last
        if replay is None:
            raise RuntimeError("the step was not replayed")
        return {
            "error": error,
            "allowed": TOLERANCES[self.dtype],
            "graph_ms": self._device_ms(replay),
            "whole_ms": self._host_ms(lambda: graphs.run(batch), self.plan.rounds),
            "eager_ms": self._host_ms(lambda: runner.execute(batch), min(EAGER_ROUNDS, self.plan.rounds)),
            "nodes": capture.last_nodes,
        }

    def _device_ms(self, replay: Callable[[], object]) -> float:
        if not self.is_gpu:
            return self._host_ms(replay, self.plan.rounds)
        for _ in range(3):
            replay()
        return median(timed_passes(replay, self.plan.rounds, self.device)) * 1e-3

    def _host_ms(self, call: Callable[[], object], rounds: int) -> float:
        samples = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            call()
            if self.is_gpu:
                torch.cuda.synchronize(self.device)
            samples.append((time.perf_counter() - started) * 1e3)
        return median(samples[1:])
