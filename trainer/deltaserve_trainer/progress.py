"""What a run tells while it works; the command line draws it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """``phase`` is "selecting", "training", "evaluating". ``seconds_left`` is None until the first step is done."""

    phase: str
    step: int
    total_steps: int
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
