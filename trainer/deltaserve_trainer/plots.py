"""The loss curve of a run as a picture, without a display or a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_loss(metrics: Sequence[dict[str, Any]], path: Path, *, title: str, best_step: int) -> None:
    """Training, held-out and general loss (above), learning rate and gradient norm (below), over steps; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps = [row["step"] for row in metrics if "loss" in row]
    losses = [row["loss"] for row in metrics if "loss" in row]
    if steps:
        upper.plot(steps, losses, color="#9db4d0", linewidth=0.8, label="training, per batch")
        upper.plot(steps, _smoothed(losses), color="#2f5d94", linewidth=1.6, label="training, smoothed")
    for key, label, colour in (
        ("eval_loss", "held-out target", "#c8553d"),
        ("general_loss", "general text", "#588157"),
    ):
        points = [(row["step"], row[key]) for row in metrics if row.get(key) is not None]
        if points:
            upper.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=label)
    upper.axvline(best_step, color="#888888", linestyle=":", label=f"best, step {best_step}")
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(title)
    upper.grid(alpha=0.25)
    upper.legend(fontsize=9)
    if steps:
        lower.plot(steps, [row["learning_rate"] for row in metrics if "loss" in row], color="#444444")
        norms = lower.twinx()
        norms.plot(steps, [row["gradient_norm"] for row in metrics if "loss" in row], color="#d9a441", linewidth=0.8)
        norms.set_ylabel("gradient norm", color="#a87a1f")
        norms.set_ylim(bottom=0)
    lower.set_ylabel("learning rate")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("training step")
    lower.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smooth, total, result = 0.0, 0.0, []
    for value in values:
        smooth = weight * smooth + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(smooth / total)
    return result
