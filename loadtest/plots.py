"""Plots, each drawn from one record alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.derive import Figures, Get, latency, over_rounds, ratio, rounds_of, throughput

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
    """TTFT, ITL and goodput against the offered rate, the limits and the knee marked."""
    by_rate: dict[float, list[Figures]] = {}
    for point in record["points"]:
        by_rate.setdefault(point["rate"], []).append(point)
    rates = sorted(by_rate)
    rounds = [by_rate[rate] for rate in rates]
    given, knee = record["parameters"], record["knee"]["rate"]
    with canvas(path, 3, width=5.0) as (figure, (first, between, good)):
        for axes, kind, limit in (
            (first, "ttft", given["ttft_limit_seconds"]),
            (between, "itl", given["itl_limit_seconds"]),
        ):
            for percentile, colour in (("p50", BLUE), ("p95", GREEN), ("p99", ORANGE)):
                with_spread(axes, rates, rounds, latency(kind, percentile), scale=1000, color=colour, label=percentile)
            if limit is not None:
                axes.axhline(1000 * limit, color=RED, linestyle=":", label="limit")
            axes.set(xlabel="requests/s offered", ylabel=f"{kind.upper()} (ms)")
        first.set_yscale("log")
        first.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        between.set_ylim(bottom=0)
        first.set_title("Time to first token")
        between.set_title("Inter-token latency")
        with_spread(good, rates, rounds, lambda f: f["goodput"]["requests_per_second"], color=BLUE, label="goodput")
        with_spread(good, rates, rounds, lambda f: f["requests_per_second"], color=GREY, label="answered")
        good.plot([0, rates[-1]], [0, rates[-1]], color=GREY, linestyle="--", linewidth=1, label="offered")
        good.set(xlabel="requests/s offered", ylabel="requests/s", title="Goodput: requests that kept the limits")
        good.set_ylim(bottom=0)
        for axes in (first, between, good):
            axes.set_xlim(left=0)
            if knee is not None:
                axes.axvline(knee, color=GREEN, linewidth=1.2, linestyle="-.", label=f"knee, {knee:g}/s")
            axes.legend(fontsize="small")
        figure.suptitle(f"{record['server']['num_adapters']} adapters, {given['popularity']}")


def draw_adapters(record: Record, path: Path) -> None:
    """Throughput against distinct adapters in the traffic, beside the base alone."""
    points = [point for point in record["points"] if point["axis"] == "adapters" and point["adapters"]]
    base = over_rounds(rounds_of(record, "base"), throughput)
    with canvas(path) as (_, axes):
        counts = [point["adapters"] for point in points]
        with_spread(
            axes, counts, [rounds_of(record, p["name"]) for p in points], throughput, color=ORANGE, label="adapters"
        )
        if base is not None:
            axes.axhline(base["median"], color=BLUE, label="base alone")
            axes.axhspan(base["min"], base["max"], color=BLUE, alpha=0.15, linewidth=0)
        if counts:
            axes.set_xscale("log", base=2)
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.minorticks_off()
        title = f"Throughput at concurrency {record['parameters']['concurrency']}"
        axes.set(xlabel="distinct adapters in the traffic", ylabel="tokens/s", title=title)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower left")


def draw_ranks(record: Record, path: Path) -> None:
    """Overhead of the median ITL over the base against the mean rank, and bytes an adapter takes."""
    points = [point for point in record["points"] if point["axis"] == "rank"]
    base = rounds_of(record, "base")
    with canvas(path, 2, width=5.2) as (figure, (time, size)):
        for label, colour, marker, chosen in (
            ("one rank", ORANGE, "o", [point for point in points if point["rank"] is not None]),
            ("ranks mixed", GREEN, "D", [point for point in points if point["rank"] is None]),
        ):
            style = {"fmt": marker, "color": colour, "capsize": 3}
            for index, point in enumerate(chosen):
                found = ratio(rounds_of(record, point["name"]), base, latency("itl", "p50"))
                if found is not None:
                    middle, low, high = (100 * (found[key] - 1) for key in ("median", "min", "max"))
                    bars = [[middle - low], [high - middle]]
                    named = label if index == 0 else None
                    time.errorbar([point["mean_rank"]], [middle], yerr=bars, label=named, **style)
                if point["adapter_bytes"]:
                    size.plot(point["mean_rank"], point["adapter_bytes"] / 1e6, marker, color=colour)
        time.axhline(0, color=BLUE, label="base alone")
        time.set(xlabel="mean rank", ylabel="median ITL over the base (%)", title="Time")
        size.set(xlabel="mean rank", ylabel="MB an adapter", title="Bytes")
        size.set_ylim(bottom=0)
        for axes in (time, size):
            axes.set_xlim(left=0)
        time.legend()
        figure.suptitle(f"Overhead against rank, concurrency {record['parameters']['concurrency']}")


def draw_churn(record: Record, path: Path) -> None:
    """P50 and P99 of the steady stream's ITL in each phase, one point a round."""
    phases = [name for name in ("quiet", "resident", "load", "upload") if any(rounds_of(record, name))]
    with canvas(path) as (_, axes):
        for percentile, colour, shift in (("p50", BLUE, -0.08), ("p99", ORANGE, 0.08)):
            xs = [index + shift for index in range(len(phases))]
            rounds = [rounds_of(record, phase) for phase in phases]
            get = latency("itl", percentile)
            with_spread(axes, xs, rounds, get, scale=1000, color=colour, label=f"ITL {percentile}", linestyle="none")
        quiet = over_rounds(rounds_of(record, "quiet"), latency("itl", "p99"))
        if quiet is not None:
            bound = 1500 * quiet["median"]
            axes.axhline(bound, color=RED, linestyle=":", label="1.5 x quiet p99")
        axes.set_xticks(range(len(phases)), phases)
        axes.set(ylabel="ITL of the steady stream (ms)", title="While adapters come and go")
        axes.set_ylim(bottom=0)
        axes.legend()


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


DRAWN: dict[str, dict[str, Callable[[Record, Path], None]]] = {
    "compare": {"throughput": draw_compare},
    "sweep": {"latency_against_rate": draw_sweep},
    "churn": {"itl_under_churn": draw_churn},
    "capacity": {"throughput_against_adapters": draw_adapters, "overhead_against_rank": draw_ranks},
    "offline": {},
}


def draw_all(record: Record, folder: Path, name: str) -> list[Path]:
    """Every plot of a record as ``folder/name-PLOT.png``; a capacity record draws the axes it has."""
    made = []
    for plot, draw in DRAWN[record["kind"]].items():
        axis = {"throughput_against_adapters": "adapters", "overhead_against_rank": "rank"}.get(plot)
        if axis and not any(p["axis"] == axis and p["adapters"] for p in record["points"]):
            continue
        draw(record, folder / f"{name}-{plot}.png")
        made.append(folder / f"{name}-{plot}.png")
    return made
