"""What was aimed at, against what was measured: one row a goal, met, missed or not measured.

A goal counts as met only when every figure it speaks of is there; as missed when one of them is short. Nothing here
decides an exit status: a benchmark does not fail for being slow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from deltabench.journal import Entry
from deltabench.points import DECODE_POINTS, EQUAL_BYTES, FEW_ACTIVE, MIXED, PREFILL_POINT

GROUPS = ("qkv", "o", "gate_up", "down")
VLLM = "vLLM shrink + expand"


@dataclass(frozen=True)
class Goal:
    """``verdict``: met, missed, not measured."""

    number: str
    measure: str
    goal: str
    measured: str
    verdict: str


class Figures:
    """Look-ups in a run's entries; only what is ok counts."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = [entry for entry in entries if entry.get("status") == "ok"]
        self.form = self._choose_form()

    def of(self, kind: str) -> list[Entry]:
        return [entry for entry in self._entries if entry["kind"] == kind]

    def one(self, kind: str, point: str, group: str, implementation: str) -> Entry | None:
        for entry in self.of(kind):
            if (entry["point"], entry["group"], entry["implementation"]) == (point, group, implementation):
                return entry
        return None

    def number(self, field: str, kind: str, point: str, group: str, implementation: str) -> float | None:
        entry = self.one(kind, point, group, implementation)
        return None if entry is None or entry.get(field) is None else float(entry[field])

    def added(self, kind: str, point: str, group: str, implementation: str) -> float | None:
        """Microseconds; a difference of two times, so noise can bring it to zero, where no ratio has a meaning."""
        found = self.number("added_us", kind, point, group, implementation)
        return found if found is not None and found > 0 else None

    def fraction(self, kind: str, point: str, group: str, implementation: str) -> float | None:
        """Of the floor: 1 is as fast as memory allows."""
        added = self.added(kind, point, group, implementation)
        floor = self.number("floor_us", kind, point, group, implementation)
        return None if added is None or floor is None else floor / added

    def step(self, point: str, field: str) -> float | None:
        """A figure of a whole decode step."""
        for entry in self.of("step"):
            if entry["point"] == point and entry.get(field) is not None:
                return float(entry[field])
        return None

    def rivals(self, kind: str, point: str, group: str) -> dict[str, float]:
        """Added time of everything that is not ours."""
        found = {}
        for entry in self.of(kind):
            if entry["point"] == point and entry["group"] == group and entry["origin"] != "ours":
                added = self.added(kind, point, group, entry["implementation"])
                if added is not None:
                    found[entry["implementation"]] = added
        return found

    def _choose_form(self) -> str:
        """Our decode form with the best mean over the cases that all of them have: a server runs one form for all."""
        wanted = {point.name for point in DECODE_POINTS}
        forms: dict[str, dict[tuple[str, str], float]] = {}
        for entry in self.of("lora"):
            added = self.added("lora", entry["point"], entry["group"], entry["implementation"])
            if entry["origin"] == "ours" and entry["point"] in wanted and added is not None:
                forms.setdefault(entry["implementation"], {})[entry["point"], entry["group"]] = added
        common = set.intersection(*(set(found) for found in forms.values())) if forms else set()
        if not common:
            return max(forms, key=lambda form: len(forms[form])) if forms else "two launches"
        return min(forms, key=lambda form: geometric([forms[form][case] for case in sorted(common)]))


def geometric(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def judge(number: str, measure: str, goal: str, parts: Iterable[tuple[str, float | None, float, bool]]) -> Goal:
    """``parts``: (label, value or None, limit, whether more is better)."""
    parts = list(parts)
    known = [(label, value, limit, more) for label, value, limit, more in parts if value is not None]
    if not known:
        return Goal(number, measure, goal, "-", "not measured")
    short = [label for label, value, limit, more in known if (value < limit if more else value > limit)]
    shown = ", ".join(f"{label} {value:.3g}" for label, value, _, _ in known)
    if short:
        return Goal(number, measure, goal, shown, "missed")
    return Goal(number, measure, goal, shown, "met" if len(known) == len(parts) else "not measured")


def all_goals(entries: Sequence[Entry], dry_run: bool = False) -> list[Goal]:
    """Every goal. After a dry run none is measured: its figures are of tiny shapes on a host."""
    figures = Figures([] if dry_run else entries)
    rows: list[Callable[[Figures], Goal]] = [
        _base, _fraction_large, _fraction_small, _over_vllm, _over_vllm_few, _over_vllm_mixed, _over_best, _step,
        _step_qv, _nodes, _rank_waste, _base_only, _one_row, _prefill, _sparse_fraction, _sparse_rivals, _metadata,
        _repeatable,
    ]  # fmt: skip
    return [row(figures) for row in rows]


def _base(f: Figures) -> Goal:
    parts = [(f"T={rows}", f.step(f"base T={rows}", "over_floor"), 1.25, False) for rows in (1, 16, 64)]
    return judge("base", "base step over its own floor (weights, head, KV read)", "<= 1.25", parts)


def _fractions(f: Figures, limits: dict[str, dict[str, float]]) -> list[tuple[str, float | None, float, bool]]:
    return [
        (f"{point} {group}", f.fraction("lora", point, group, f.form), limit, True)
        for point, of_group in limits.items()
        for group, limit in of_group.items()
    ]


def _fraction_large(f: Figures) -> Goal:
    limits = {"qkv": 0.70, "o": 0.70, "gate_up": 0.80, "down": 0.80}
    parts = _fractions(f, {"(64,64,64)": limits, "(256,256,16)": limits})
    return judge(
        "1", f"share of memory speed, large adapters, {f.form}", ">= 0.80 gate_up, down; >= 0.70 qkv, o", parts
    )


def _fraction_small(f: Figures) -> Goal:
    parts = _fractions(f, {"(64,64,16)": {"qkv": 0.60, "o": 0.50, "gate_up": 0.70, "down": 0.60}})
    return judge(
        "1", f"share of memory speed, small adapters, {f.form}", ">= 0.70 gate_up, 0.60 qkv and down, 0.50 o", parts
    )


def _speedups(f: Figures, points: Iterable[str], rival: str | None) -> list[float] | None:
    """Over one rival, or (None) the fastest of each case. None when some case is missing."""
    found = []
    for point in points:
        for group in GROUPS:
            ours, others = f.added("lora", point, group, f.form), f.rivals("lora", point, group)
            theirs = others.get(rival) if rival is not None else min(others.values(), default=None)
            if ours is None or theirs is None:
                return None
            found.append(theirs / ours)
    return found


def _mean_and_least(
    found: list[float] | None, mean: float, least: float
) -> list[tuple[str, float | None, float, bool]]:
    return [
        ("mean", geometric(found) if found else None, mean, True),
        ("least", min(found) if found else None, least, True),
    ]


def _over_vllm(f: Figures) -> Goal:
    found = _speedups(f, [point.name for point in DECODE_POINTS], VLLM)
    return judge("2", "speed over vLLM's defaults", "mean >= 2.0, never < 1.1", _mean_and_least(found, 2.0, 1.1))


def _over_vllm_few(f: Figures) -> Goal:
    found = _speedups(f, [FEW_ACTIVE.name], VLLM)
    parts = _mean_and_least(found, 3.0, 1.1)
    return judge("2", "the same, 8 of 64 slots active", "mean >= 3", parts)


def _over_vllm_mixed(f: Figures) -> Goal:
    found = _speedups(f, [MIXED.name], VLLM)
    return judge("2", "the same, ranks 8, 16, 32, 64", "mean >= 2.5", _mean_and_least(found, 2.5, 1.1))


def _over_best(f: Figures) -> Goal:
    found = _speedups(f, [point.name for point in DECODE_POINTS], None)
    measured = sorted(
        {name for point in DECODE_POINTS for group in GROUPS for name in f.rivals("lora", point.name, group)}
    )
    label = f"speed over the best of: {', '.join(measured) or 'nobody'}"
    return judge("3", label, "mean >= 1.2, never < 0.95", _mean_and_least(found, 1.2, 0.95))


def _step(f: Figures) -> Goal:
    limits = {"(1,1,16)": 0.04, "(16,16,16)": 0.16, "(64,64,16)": 0.52, "(256,32,16)": 0.32}
    parts = [(point, f.step(point, "overhead"), limit, False) for point, limit in limits.items()]
    return judge("4", "decode step, added by adapters on all linears", "<= 4 %, 16 %, 52 %, 32 %", parts)


def _step_qv(f: Figures) -> Goal:
    parts = [("share", f.step("(64,64,16) on q, v", "overhead"), 0.10, False)]
    return judge("4", "decode step, 64 adapters on q and v alone", "<= 10 %", parts)


def _nodes(f: Figures) -> Goal:
    return judge(
        "5", "graph nodes added per layer", "<= 4", [("nodes", f.step("(64,64,16)", "nodes_per_layer"), 4.0, False)]
    )


def _rank_waste(f: Figures) -> Goal:
    parts: list[tuple[str, float | None, float, bool]] = []
    for group in GROUPS:
        mixed, equal = (f.added("lora", point.name, group, f.form) for point in (MIXED, EQUAL_BYTES))
        parts.append((group, mixed / equal if mixed and equal else None, 1.10, False))
    return judge("6", "time of ranks 8..64 over one rank of equal bytes", "<= 1.10", parts)


def _base_only(f: Figures) -> Goal:
    parts = [("ratio", f.step("base rows on an adapter server, T=64", "over_base"), 1.01, False)]
    return judge("7", "base-only step on an adapter server / without adapters", "<= 1.00 and noise (0.01)", parts)


def _one_row(f: Figures) -> Goal:
    row, single = f.step("(64,1,16), one row of 64", "added_ms"), f.step("(1,1,16)", "added_ms")
    value = row / single if row is not None and single else None
    return judge(
        "7", "one adapter row among 64 / (1,1,16), added time", "<= 1 and noise (0.15)", [("ratio", value, 1.15, False)]
    )


def _prefill(f: Figures) -> Goal:
    entries = [f.one("lora", PREFILL_POINT.name, group, "prefill form") for group in GROUPS]
    share = None
    if all(entry is not None and entry.get("added_us") is not None for entry in entries):
        known = [entry for entry in entries if entry is not None]
        share = sum(entry["added_us"] for entry in known) / sum(entry["base_us"] for entry in known)
    return judge("8", "prefill of 4096 tokens, 8 adapters: added time", "<= 12 %", [("share", share, 0.12, False)])


def _sparse_fraction(f: Figures) -> Goal:
    parts = [
        (f"{point} {group}", f.fraction("sparse", point, group, "sparse kernel"), limit, True)
        for point, limit in (("(64,64,0)", 0.60), ("(256,256,0)", 0.70))
        for group in GROUPS
    ]
    return judge("9", "sparse 0.5 %: share of memory speed", ">= 0.60 at (64,64), 0.70 at (256,256)", parts)


def _sparse_rivals(f: Figures) -> Goal:
    parts: list[tuple[str, float | None, float, bool]] = []
    for rival, limit in (("merge and GEMM", 5.0), ("torch CSR loop", 3.0)):
        found = []
        for group in GROUPS:
            ours = f.added("sparse", "(64,64,0)", group, "sparse kernel")
            theirs = f.rivals("sparse", "(64,64,0)", group).get(rival)
            if ours is not None and theirs is not None:
                found.append(theirs / ours)
        parts.append((rival, min(found) if len(found) == len(GROUPS) else None, limit, True))
    return judge("9", "sparse 0.5 %: speed over rivals at (64,64), the least", ">= 5 merge, >= 3 CSR loop", parts)


def _metadata(f: Figures) -> Goal:
    entry = next(iter(f.of("metadata")), None)
    value = float(entry["median_us"]) if entry is not None else None
    return judge("10", "per-step metadata on the device, microseconds", "<= 15", [("us", value, 15.0, False)])


def _repeatable(f: Figures) -> Goal:
    entry = next(iter(f.of("repeatability")), None)
    parts: list[tuple[str, float | None, float, bool]] = []
    for name in ("alone", "replay"):
        found = None if entry is None or entry.get(name) is None else float(entry[name])
        parts.append((name, found, 1.0, True))
    return judge("11", "a row's bits alone and in company; replay and eager (1: equal)", "equal", parts)
