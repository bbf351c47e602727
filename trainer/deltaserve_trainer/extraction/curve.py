"""Size against divergence as a picture, without a display or a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deltaserve_trainer.extraction.extract import Extraction

BLUE, ORANGE, GREEN, GREY = "#2f5d94", "#d9822b", "#588157", "#777777"
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
    mixed = [point for point in points if point.forms == "mixed"]
    axes.plot(
        [point.num_bytes for point in mixed],
        [point.divergence for point in mixed],
        color=BLUE,
        marker="o",
        label="best form for each linear",
    )
    for point in mixed:
        axes.annotate(
            f"{point.kept:.0%}",
            (point.num_bytes, point.divergence),
            textcoords="offset points",
            xytext=(6, 7),
            fontsize=8,
            color=BLUE,
        )
    for form, marker, colour in (("low rank", "s", ORANGE), ("sparse", "^", GREEN)):
        found = [point for point in points if point.forms == form]
        axes.plot(
            [point.num_bytes for point in found],
            [point.divergence for point in found],
            marker=marker,
            markersize=7,
            markerfacecolor="none",
            linestyle="none",
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
    sizes = sorted({point.num_bytes for point in mixed})
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: told_bytes(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.7)
    axes.set_xlabel("adapter files (labels: share of the squared difference that is kept)")
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
