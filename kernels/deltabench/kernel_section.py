"""Times low-rank and sparse operators on fused linears of a model: right first, then fast.

Per case (point, fused linear): the base's product over several layers with their own weights, then base and adapters in
one pass. What the adapters cost is the difference: in place, cold, their launches included. Every implementation is
held to float64 before it is timed, and a wrong one is not timed.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from deltabench import floors, implementations, sparse_implementations
from deltabench.cases import AddDelta, Case, LoraCase, SparseCase
from deltabench.floors import FusedLinear, Rates
from deltabench.implementations import Implementation, NotPresent
from deltabench.journal import Budget, Journal
from deltabench.points import Plan, Point
from deltabench.timing import CaptureFailed, Clock, GraphClock, QueueClock, Timing, WallClock, capture, is_alive
from deltaserve_kernels import build_work_list

DEVICE_LOST = 75  # exit status: nothing more can run in this process
PREFILL_ROWS = 1024


@dataclass
class KernelSection:
    """``groups``: names of fused linears to measure, all by default. ``warm``: check only, so that kernels are compiled
    and cached; nothing is timed. ``capturable``: names of those implementations that were found to be (``probe``)."""

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    rates: Rates
    journal: Journal
    budget: Budget
    groups: Sequence[str] = ()
    warm: bool = False
    capturable: frozenset[str] = frozenset()

    def lora(self) -> None:
        others: tuple[Implementation, ...] = ()
        if importlib.util.find_spec("triton") is not None:
            others = importlib.import_module("deltabench.vendor").VENDORS
        known = (*implementations.OURS, *others, *implementations.BASELINES)
        for point in self.plan.lora:
            wanted = fitting(known, point)
            for group in self._groups():
                make = partial(LoraCase, group, point, self._layers(), self.dtype, self.device)
                floor = floors.lora_seconds(group, point.rows, point.all_ranks, self.rates, self.dtype.itemsize)
                self._case("lora", point, group, make, wanted, floor)
        if not self.warm:
            self._once("metadata", self._metadata)
            self._once("repeatability", self._repeatability)

    def sparse(self) -> None:
        known = (*sparse_implementations.OURS, *sparse_implementations.BASELINES)
        density, size = self.plan.density, self.dtype.itemsize
        for point in self.plan.sparse:
            wanted = fitting(known, point)
            for group in self._groups():
                layers = self._layers(min(self.plan.layers, 4))
                make = partial(SparseCase, group, point, layers, self.dtype, self.device, density)
                num_bytes = floors.sparse_bytes(group, point.rows, point.adapters, density, size)
                self._case("sparse", point, group, make, wanted, num_bytes / self.rates.copy)

    def _groups(self) -> list[FusedLinear]:
        return [group for group in self.plan.shape.groups if not self.groups or group.name in self.groups]

    def _layers(self, layers: int | None = None) -> int:
        return 1 if self.warm else layers or self.plan.layers

    def _case(
        self,
        kind: str,
        point: Point,
        group: FusedLinear,
        make: Callable[[], Case],
        wanted: Sequence[Implementation],
        floor: float,
    ) -> None:
        keys = {one.name: f"{kind} {point.name} {group.name} {one.name}" for one in wanted}
        left = [one for one in wanted if not self.journal.is_done(keys[one.name])]
        if not left:
            return
        about = {**point.describe(), "group": group.name}
        base = floors.base_seconds(group, point.rows, self.rates, self.dtype.itemsize)
        about |= {"floor_us": floor * 1e6, "base_floor_us": base * 1e6}
        if self.budget.is_over:
            for one in left:
                fields = {**about, "implementation": one.name, "origin": one.origin}
                self.journal.add(kind, keys[one.name], "skipped", fields, "the section's time is over")
            return
        case = make()
        if not self.warm:
            timing = self._clock(True).time([partial(case.base, layer) for layer in range(case.layers)], self._rounds)
            about["base_us"] = timing.median_us / case.layers
            about["base_nodes"] = None if timing.nodes is None else timing.nodes / case.layers
        for one in left:
            self._measure(kind, keys[one.name], case, one, about)

    def _measure(self, kind: str, key: str, case: Case, one: Implementation, about: dict[str, Any]) -> None:
        fields = {**about, "implementation": one.name, "origin": one.origin}
        if self.budget.is_over:
            self.journal.add(kind, key, "skipped", fields, "the section's time is over")
            return
        self.journal.start(key)
        try:
            run = one.prepare(case)
            error, allowed = check(case, one, run)
            fields |= {"error": error, "allowed": allowed}
            if not error <= allowed:
                self.journal.add(
                    kind, key, "wrong", fields, f"differs from float64 by {error:.2e} of the largest value"
                )
                return
            if not self.warm:
                fields |= self._time(case, one, run, about)
        except NotPresent as reason:
            self.journal.add(kind, key, "not present", fields, str(reason))
        except Exception as error:  # one implementation's failure must not take the others' figures with it
            self.journal.add(kind, key, "failed", fields, f"{type(error).__name__}: {str(error)[:300]}")
            self._recover(error)
        else:
            self.journal.add(kind, key, "ok", fields)

    def _time(self, case: Case, one: Implementation, run: AddDelta, about: dict[str, Any]) -> dict[str, Any]:
        layers = min(case.layers, one.layers or case.layers)
        calls: list[Callable[[], object]] = []
        for layer in range(layers):
            if not one.replaces_base:
                calls.append(partial(case.base, layer))
            calls.append(partial(run, layer, case.y))
        timing = self._clock(one.capturable or one.name in self.capturable).time(calls, self._rounds)
        total, base = timing.median_us / layers, float(about["base_us"])
        added = total - base
        nodes = None
        if timing.nodes is not None and about["base_nodes"] is not None:
            nodes = timing.nodes / layers - about["base_nodes"]
        fields = {
            "total_us": total,
            "added_us": added,
            "over_floor": added / float(about["floor_us"]),
            "spread_us": [timing.min_us / layers, timing.max_us / layers],
            "rounds": timing.rounds,
            "layers": layers,
            "clock": timing.clock,
            "nodes": nodes,
        }
        if one.origin == "ours" and self.device.type == "cuda":
            alone = self._clock(True).time([partial(run, layer, case.y) for layer in range(layers)], self._rounds)
            fields["alone_us"] = alone.median_us / layers
        return fields

    @property
    def _rounds(self) -> int:
        return self.plan.rounds

    def _clock(self, capturable: bool) -> Clock:
        if self.device.type != "cuda":
            return WallClock()
        return GraphClock(self.device) if capturable else QueueClock(self.device)

    def _once(self, kind: str, measure: Callable[[str], None]) -> None:
        if self.journal.is_done(kind):
            return
        if self.budget.is_over:
            self.journal.add(kind, kind, "skipped", {}, "the section's time is over")
            return
        self.journal.start(kind)
        try:
            measure(kind)
        except NotPresent as reason:
            self.journal.add(kind, kind, "not present", {}, str(reason))
        except Exception as error:
            self.journal.add(kind, kind, "failed", {}, f"{type(error).__name__}: {str(error)[:300]}")
            self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Go on after a failure with the memory it held, or end the process with a device that is lost to it."""
        if isinstance(error, CaptureFailed) or not is_alive(self.device):
            raise SystemExit(DEVICE_LOST) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _metadata(self, key: str) -> None:
        """What the kernels derive from a work list on the device, once per step."""
        point = max(self.plan.lora, key=lambda one: one.adapters)
        parts = [((row % point.adapters, 1.0, 1.0),) for row in range(point.rows)]
        work = build_work_list(parts, self.device)
        tiles = importlib.import_module("deltaserve_kernels.triton_ops.tiles")
        # A list met for the first time is what a step brings, so each call gets an equal one that is new.
        timing: Timing = self._clock(True).time([lambda: tiles.row_tiles(dataclasses.replace(work), 16)], self._rounds)
        fields = {**point.describe(), "median_us": timing.median_us, "nodes": timing.nodes, "clock": timing.clock}
        self.journal.add("metadata", key, "ok", fields)

    def _repeatability(self, key: str) -> None:
        """A row's bits alone and in company, and of a replayed graph and eager launches; per form and linear."""
        point = self.plan.lora[0]
        forms = [one for one in implementations.OURS if one.decode]
        equal_alone, equal_replay = True, True
        for group in self._groups():
            case = LoraCase(group, point, 1, self.dtype, self.device)
            case.base(0)
            before = case.y.clone()
            for one in forms:
                together = before.clone()
                run = one.prepare(case)
                run(0, together)
                for row in {0, point.rows - 1}:
                    y = before[row : row + 1].clone()
                    one.prepare(only(case, row))(0, y)
                    equal_alone &= bool(torch.equal(y[0], together[row]))
                if self.device.type == "cuda":
                    y = before.clone()
                    graph = capture([partial(run, 0, y)])
                    y.copy_(before)
                    graph.replay()
                    equal_replay &= bool(torch.equal(y, together))
        fields = {**point.describe(), "alone": equal_alone}
        fields["replay"] = equal_replay if self.device.type == "cuda" else None
        self.journal.add("repeatability", key, "ok", fields)


def fitting(known: Iterable[Implementation], point: Point) -> list[Implementation]:
    """Those that are measured at such a point."""
    is_prefill = point.rows >= PREFILL_ROWS
    return [one for one in known if (one.prefill if is_prefill else one.decode)]


def check(case: Case, one: Implementation, run: AddDelta) -> tuple[float, float]:
    """The largest difference from float64 over the largest value, and what is allowed."""
    case.base(0)
    y = case.y.clone()
    run(0, y)
    expected = case.expected(case.expected_base() if one.replaces_base else case.y)
    error = (y.double() - expected).abs().max() / expected.abs().max()
    return float(error), one.tolerance(case.dtype)


def only(case: LoraCase, row: int) -> LoraCase:
    """The same case with one of its rows."""
    alone = copy.copy(case)
    alone.x = case.x[row : row + 1].clone()
    alone.work = build_work_list([((int(case.owner[row]), 1.0, 1.0),)], case.device)
    return alone
