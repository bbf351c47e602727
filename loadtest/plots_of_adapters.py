"""Plots of what adapters cost, and which plots belong to a record of which kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from loadtest.derive import latency, over_rounds, ratio, ratios, rounds_of, throughput
from loadtest.figures import spread
from loadtest.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Record,
    canvas,
    draw_churn,
    draw_compare,
    draw_sweep,
    with_spread,
)
from loadtest.plots_of_kinds import draw_kinds
from loadtest.tables_of_adapters import fits, points_on


def draw_registered(record: Record, path: Path) -> None:
    """Each round's ratio to the server without adapters: of the one that holds them, and of another without."""
    none = rounds_of(record, "none")
    held = f"{record['parameters']['num_adapters']:,} adapters registered"
    with canvas(path, 2, width=5.2) as (figure, axes):
        for each, get, title in zip(axes, (throughput, latency("itl", "p50")), ("tokens/s", "ITL p50"), strict=True):
            for name, label, colour, marker in (
                ("none again", "a second server without", BLUE, "s"),
                ("adapters", held, ORANGE, "o"),
            ):
                values = ratios(rounds_of(record, name), none, get)
                if not values:
                    continue
                middle = spread(values)["median"]
                each.plot(range(1, len(values) + 1), values, marker, color=colour, label=f"{label}: {middle:.3f}")
                each.axhline(middle, color=colour, linewidth=1)
            each.axhline(1, color=GREY, linestyle=":", linewidth=1)
            each.set(xlabel="round", ylabel=f"{title} / server without adapters", title=title)
            if values:
                each.legend(fontsize="small")
        figure.suptitle("Base-only traffic beside registered adapters (lines: medians)")


def draw_adapters(record: Record, path: Path) -> None:
    """Throughput against adapters in the traffic, a line for each law of popularity, beside the base alone."""
    points = points_on(record, "adapters")
    base = over_rounds(rounds_of(record, "base"), throughput)
    with canvas(path) as (_, axes):
        for law, colour, shift in (("distinct", ORANGE, 1.0), ("uniform", GREEN, 0.97), ("zipf", RED, 1.03)):
            own = [point for point in points if point["law"] == law]
            if own:
                counts = [shift * point["adapters"] for point in own]
                rounds = [rounds_of(record, point["name"]) for point in own]
                with_spread(axes, counts, rounds, throughput, color=colour, label=law)
        if base is not None:
            axes.axhline(base["median"], color=BLUE, label="base alone")
            axes.axhspan(base["min"], base["max"], color=BLUE, alpha=0.15, linewidth=0)
        shown = sorted({point["adapters"] for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(shown, [f"{count:,}" for count in shown])
        axes.minorticks_off()
        title = f"Throughput at concurrency {record['parameters']['concurrency']}"
        axes.set(xlabel="adapters in the traffic", ylabel="tokens/s", title=title)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower left")


def draw_ranks(record: Record, path: Path) -> None:
    """Median ITL over the base against the rank sum of a step's rows, and bytes against an adapter's rank."""
    points, base, itl = points_on(record, "rank"), rounds_of(record, "base"), latency("itl", "p50")
    fitted, sized = fits(record)
    with canvas(path, 2, width=5.2) as (figure, (time, size)):
        for label, colour, marker, chosen in (
            ("one rank", ORANGE, "o", [point for point in points if point["rank"] is not None]),
            ("ranks mixed", GREEN, "D", [point for point in points if point["rank"] is None]),
        ):
            for index, point in enumerate(chosen):
                found = ratio(rounds_of(record, point["name"]), base, itl)
                if found is not None:
                    bars = [[found["median"] - found["min"]], [found["max"] - found["median"]]]
                    style = {"fmt": marker, "color": colour, "capsize": 3, "label": label if index == 0 else None}
                    time.errorbar([point["rank_sum"]], [found["median"]], yerr=bars, **style)
                if point["adapter_bytes"]:
                    size.plot(point["mean_rank"], point["adapter_bytes"] / 1e6, marker, color=colour)
        for axes, fit, xs, scale in (
            (time, fitted, [point["rank_sum"] for point in points], 1.0),
            (size, sized, [point["mean_rank"] for point in points], 1e-6),
        ):
            if fit is not None:
                ends = np.array([0.0, max(xs)])
                told = f"least squares, R² {fit.r_squared:.3f}"
                axes.plot(ends, scale * (fit.at_zero + fit.slope * ends), color=GREY, linestyle="--", label=told)
        time.axhline(1, color=BLUE, label="base alone")
        time.set(xlabel="sum of the ranks of a step's rows", ylabel="median ITL / base", title="Time")
        size.set(xlabel="rank of an adapter (mean)", ylabel="MB an adapter", title="Bytes")
        for axes in (time, size):
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.legend(fontsize="small")
        figure.suptitle(f"Overhead against rank, concurrency {record['parameters']['concurrency']}")


DRAWN: dict[str, dict[str, Callable[[Record, Path], None]]] = {
    "compare": {"throughput": draw_compare},
    "registered": {"ratios": draw_registered},
    "sweep": {"latency_against_rate": draw_sweep},
    "churn": {"itl_under_churn": draw_churn},
    "capacity": {"throughput_against_adapters": draw_adapters, "overhead_against_rank": draw_ranks},
    "offline": {},
    "kinds": {"added_by_each_kind": draw_kinds},
}


def draw_all(record: Record, folder: Path, name: str) -> list[Path]:
    """Every plot of a record as ``folder/name-PLOT.png``; a capacity record draws the axes it has."""
    made = []
    for plot, draw in DRAWN[record["kind"]].items():
        axis = {"throughput_against_adapters": "adapters", "overhead_against_rank": "rank"}.get(plot)
        if axis and not points_on(record, axis):
            continue
        draw(record, folder / f"{name}-{plot}.png")
        made.append(folder / f"{name}-{plot}.png")
    return made
