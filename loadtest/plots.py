"""Plots, each drawn from one record alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.derive import Figures, Get, latency, over_rounds, rounds_of, throughput

BLUE, ORANGE, GREEN, RED, GREY = "#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8c8c8c"
Record = Mapping[str, Any]


@contextmanager
def canvas(path: Path, columns: int = 1, *, width: float = 6.4, height: float = 4.4) -> Iterator[Any]:
    """Yields ``(figure, axes)`` and saves the figure; one Axes or a list of ``columns``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width * columns, height), layout="constrained")
    try:
        yield figure, axes
        for each in np.ravel(axes):
            each.grid(alpha=0.3)
            each.set_axisbelow(True)
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)


def with_spread(
    axes: Any, xs: Sequence[float], rounds: Sequence[Sequence[Figures | None]], get: Get, **style: Any
) -> None:
    """Medians over rounds, joined, with bars from the least to the greatest."""
    found = [(x, over_rounds(each, get)) for x, each in zip(xs, rounds, strict=True)]
    known = [(x, figure) for x, figure in found if figure is not None]
    if not known:
        return
    scale = style.pop("scale", 1.0)
    middle = np.array([scale * figure["median"] for _, figure in known])
    below = middle - np.array([scale * figure["min"] for _, figure in known])
    above = np.array([scale * figure["max"] for _, figure in known]) - middle
    axes.errorbar([x for x, _ in known], middle, yerr=[below, above], capsize=3, **{"marker": "o", **style})


def draw_load(report: Record, path: Path) -> None:
    """Latency over an open-loop run, and its distribution: base beside adapters."""
    with canvas(path, 2, width=6.0, height=4.5) as (figure, (over_time, shares)):
        for kind, colour in (("base", BLUE), ("adapter", ORANGE)):
            points = [point for point in report["timeline"] if point["kind"] == kind and point["ttft"] is not None]
            if not points:
                continue
            over_time.plot([p["at"] for p in points], [1000 * p["ttft"] for p in points], ".", color=colour, label=kind)
            for key, style in (("ttft", "-"), ("e2e", "--")):
                values = np.sort([1000 * p[key] for p in points])
                share = np.arange(1, len(values) + 1) / len(values)
                shares.step(values, share, style, where="post", color=colour, label=f"{kind}, {key.upper()}")
        over_time.set(xlabel="scheduled arrival (s)", ylabel="TTFT (ms)", title="Time to first token over the run")
        over_time.set_ylim(bottom=0)
        shares.set(xlabel="milliseconds", ylabel="share of requests", title="TTFT and end-to-end latency", xscale="log")
        for axes in (over_time, shares):
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
        load = report["parameters"]
        figure.suptitle(
            f"{load['rate']:g} requests/s, {report['num_adapters']} adapters ({load['popularity']}): "
            f"{report['tokens_per_second']:.0f} tokens/s, {report['num_succeeded']}/{report['num_requests']} succeeded"
        )


def draw_sweep(record: Record, path: Path) -> None:
    """TTFT, mean ITL of a request, and goodput against the offered rate, the limits and the knee marked."""
    by_rate: dict[float, list[Figures]] = {}
    for point in record["points"]:
        by_rate.setdefault(point["rate"], []).append(point)
    rates = sorted(by_rate)
    rounds = [by_rate[rate] for rate in rates]
    given, knee = record["parameters"], record["knee"]["rate"]
    with canvas(path, 3, width=5.0) as (figure, (first, between, good)):
        for axes, kind, limit in (
            (first, "ttft", given["ttft_limit_seconds"]),
            (between, "tpot", given["itl_limit_seconds"]),
        ):
            for percentile, colour in (("p50", BLUE), ("p95", GREEN), ("p99", ORANGE)):
                with_spread(axes, rates, rounds, latency(kind, percentile), scale=1000, color=colour, label=percentile)
            if limit is not None:
                axes.axhline(1000 * limit, color=RED, linestyle=":", label="limit")
            axes.set(xlabel="requests/s offered", ylabel="ms")
        first.set_yscale("log")
        for set_formatter in (first.yaxis.set_major_formatter, first.yaxis.set_minor_formatter):
            set_formatter(lambda value, _: f"{value:,.0f}")
        between.set_ylim(bottom=0)
        first.set_title("Time to first token")
        between.set_title("Mean inter-token latency of a request")
        with_spread(good, rates, rounds, lambda f: f["goodput"]["requests_per_second"], color=BLUE, label="goodput")
        good.plot([0, rates[-1]], [0, rates[-1]], color=GREY, linestyle="--", linewidth=1, label="offered")
        good.set(xlabel="requests/s offered", ylabel="requests/s", title="Goodput: requests that kept the limits")
        good.set_ylim(bottom=0)
        for axes in (first, between, good):
            axes.set_xlim(left=0)
            if knee is not None:
                axes.axvline(knee, color=GREEN, linewidth=1.2, linestyle="-.", label=f"knee, {knee:g}/s")
            axes.legend(fontsize="small")
        figure.suptitle(f"{record['server']['num_adapters']} adapters, {given['popularity']}")


def draw_churn(record: Record, path: Path) -> None:
    """P50 and P99 of the steady streams' ITL in each phase: over all its windows, bars over the rounds."""
    phases = [name for name in ("quiet", "resident", "load", "upload") if any(rounds_of(record, name))]
    titles = {
        "quiet": "quiet",
        "resident": "requests to one\nresident adapter",
        "load": f"requests to {record['parameters']['other_adapters']}\nadapters in turn",
        "upload": "register,\nreplace, delete",
    }
    with canvas(path) as (_, axes):
        for percentile, colour, shift in (("p50", BLUE, -0.08), ("p99", ORANGE, 0.08)):
            get = latency("itl", percentile)
            for index, phase in enumerate(phases):
                whole, found = get(record["whole"][phase]), over_rounds(rounds_of(record, phase), get)
                if whole is None or found is None:
                    continue
                label = f"ITL {percentile} of all rounds" if index == 0 else None
                axes.vlines(index + shift, 1000 * found["min"], 1000 * found["max"], color=colour, alpha=0.5)
                axes.plot(index + shift, 1000 * whole, "o", color=colour, label=label)
        bound = 1500 * record["whole"]["quiet"]["latency"]["itl_seconds"]["p99"]
        axes.axhline(bound, color=RED, linestyle=":", label="1.5 x quiet p99")
        axes.set_xticks(range(len(phases)), [titles[name] for name in phases])
        title = f"{record['parameters']['steady']} steady streams while adapters come and go (bars: rounds)"
        axes.set(ylabel="ITL of the steady streams (ms)", title=title)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.legend(fontsize="small", loc="upper left", ncols=3)


def draw_compare(record: Record, path: Path) -> None:
    """Tokens per second of every server in every case."""
    cases = list(record["parameters"]["cases"])
    colours = dict(zip(record["servers"], (ORANGE, BLUE, "#8fa9d6", GREEN, GREY, RED), strict=False))
    with canvas(path, len(cases), width=4.2, height=4.0) as (_, axes):
        for each, case in zip(np.ravel(axes), cases, strict=True):
            found = {name: over_rounds(rounds_of(record, name, case), throughput) for name in record["servers"]}
            known = {name: figure for name, figure in found.items() if figure is not None}
            for index, (name, figure) in enumerate(known.items()):
                bars = [[figure["median"] - figure["min"]], [figure["max"] - figure["median"]]]
                each.bar(index, figure["median"], yerr=bars, capsize=3, color=colours[name])
                each.annotate(
                    f"{figure['median']:.0f}",
                    (index, figure["max"]),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                )
            each.set_xticks(range(len(known)), list(known), rotation=30, ha="right")
            loop = record["parameters"]["cases"][case]
            each.set(title=f"{case}, concurrency {loop['concurrency']}", ylabel="tokens/s")
            each.margins(y=0.12)
