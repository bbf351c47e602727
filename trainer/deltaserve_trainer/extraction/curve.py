"""Size against divergence as a picture, without a display or a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from deltaserve_trainer.extraction.extract import ALL, Extraction
from deltaserve_trainer.extraction.plan import Form

BLUE, GREY = "#2f5d94", "#777777"
STYLES: Mapping[Form, tuple[str, str]] = {
    "low rank": ("s", "#d9822b"),
    "mixed precision": ("D", "#8e3b8a"),
    "sparse": ("^", "#588157"),
    "dense": ("v", "#a33b3b"),
    "signs": ("P", "#3b8ea3"),
}
"""Marker and colour of a form alone."""
LEAST = 1e-12
"""A divergence of 0 has no place on a logarithmic axis."""


def plot_curve(extraction: Extraction, path: Path, *, title: str) -> None:
    """A PNG: divergence from the fine-tune over bytes, both logarithmic; the bare base as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [replace(point, divergence=max(point.divergence, LEAST)) for point in extraction.points]
    every = [point for point in points if point.forms == ALL]
    axes.plot(
        [point.num_bytes for point in every],
        [point.divergence for point in every],
        color=BLUE,
        marker="o",
        zorder=3,
        label="best form for each linear",
    )
    for point in every:
        axes.annotate(
            f"{point.kept:.0%}",
            (point.num_bytes, point.divergence),
            textcoords="offset points",
            xytext=(-4, -13),
            fontsize=8,
            color=BLUE,
            ha="right",
        )
    for form, (marker, colour) in STYLES.items():
        if found := [point for point in points if point.forms == form]:
            axes.plot(
                [point.num_bytes for point in found],
                [point.divergence for point in found],
                marker=marker,
                markersize=6,
                markerfacecolor="none",
                linestyle=":",
                linewidth=1,
                color=colour,
                label=f"{form} alone",
            )
    axes.axhline(extraction.base_divergence, color=GREY, linestyle="--", linewidth=1, label="no adapter")
    axes.set_xscale("log")
    axes.set_yscale("log")
    drawn = [point.divergence for point in points] + [extraction.base_divergence]
    if max(drawn) < 1000 * min(drawn):  # else the decades alone are labels enough
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    sizes = sorted({point.num_bytes for point in every})
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: told_bytes(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.7)
    axes.set_ylim(min(drawn) / 2, max(drawn) * 1.5)  # room for the labels below
    axes.set_xlabel("adapter files (labels: share of the squared differences that is kept)")
    axes.set_ylabel("KL from the fine-tune, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def told_bytes(size: float) -> str:
    """``150 MB``, in units of 1024 as ``--budget`` reads them."""
    for unit in ("B", "KB", "MB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GB"
