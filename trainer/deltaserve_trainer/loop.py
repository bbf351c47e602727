"""The training loop: one for every method. AdamW, warm-up and linear decay, clipped gradients, best state kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve_trainer.batches import BatchPlan, collate
from deltaserve_trainer.checkpoint import Checkpoint, Counters, pack, unpack, write_checkpoint
from deltaserve_trainer.encoding import EncodedExample
from deltaserve_trainer.errors import TrainingDiverged, TrainingInterrupted
from deltaserve_trainer.interrupt import StopSignals
from deltaserve_trainer.loss import mean_loss, summed_loss
from deltaserve_trainer.methods import Method
from deltaserve_trainer.progress import Progress
from deltaserve_trainer.recipe import Recipe
from deltaserve_trainer.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class LoopData:
    """Encoded rows to train on, held out, and of general text; none is empty."""

    train: Sequence[EncodedExample]
    target: Sequence[EncodedExample]
    general: Sequence[EncodedExample]
    pad_token_id: int


@dataclass(frozen=True, slots=True)
class LoopResult:
    """Counters at the end, and the parameters of the evaluation with the lowest held-out loss, by name."""

    counters: Counters
    best: dict[str, Tensor]


def num_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    return recipe.max_steps or max(1, round(recipe.epochs * steps_per_epoch))


def learning_rate_at(recipe: Recipe, step: int, total: int) -> float:
    """Rate of step ``step`` (from 0): linear warm-up, then linear decay that would reach 0 at ``total``."""
    warmup = max(1, round(recipe.warmup_fraction * total))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * (total - step) / max(1, total - warmup)


def train_batch(
    model: nn.Module, rows: Sequence[EncodedExample], recipe: Recipe, pad_token_id: int
) -> tuple[float, int]:
    """Accumulate the gradient of the batch's mean loss per trained token. Returns (that loss, tokens)."""
    size = recipe.micro_batch_size or len(rows)
    batches = [collate(rows[i : i + size], pad_token_id) for i in range(0, len(rows), size)]
    count = sum(batch.num_trained for batch in batches)
    total = 0.0
    for batch in batches:
        loss = summed_loss(model, batch, recipe.precision) / count
        loss.backward()
        total += float(loss.detach())
    return total, sum(len(row.input_ids) for row in rows)


class Loop:
    """Everything between two checkpoints. ``run`` starts at ``resume_from`` or at step 0."""

    def __init__(
        self,
        method: Method,
        recipe: Recipe,
        data: LoopData,
        folder: RunFolder,
        stop: StopSignals,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._method, self._recipe, self._data, self._folder = method, recipe, data, folder
        self._stop, self._on_progress = stop, on_progress
        self._parameters = method.parameters()
        self._optimiser = torch.optim.AdamW(
            list(self._parameters.values()), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self._plan = BatchPlan([len(row.input_ids) for row in data.train], recipe.batch_size, recipe.seed)
        self._total = num_steps(recipe, self._plan.steps_per_epoch)
        self._counters = Counters()
        self._best: dict[str, Tensor] = {}
        self._started = time.monotonic()

    def run(self, resume_from: Checkpoint | None) -> LoopResult:
        if resume_from is not None:
            unpack(resume_from, self._parameters, self._optimiser)
            self._counters, self._best = resume_from.counters, resume_from.part("best")
        self._folder.keep_metrics_until(self._counters.step)
        self._started = time.monotonic() - self._counters.train_seconds
        if self._counters.step == 0:
            self._evaluate({})
            self._save()
        while self._counters.step < self._total and not self._is_out_of_patience():
            metrics = self._train_step()
            step = self._counters.step
            if step % self._recipe.eval_every == 0 or step == self._total:
                self._evaluate(metrics)
            else:
                self._folder.add_metrics(metrics)
            if self._stop.received is not None:
                self._save()
                raise TrainingInterrupted(self._stop.received, self._folder.path, step)
            if step % self._recipe.checkpoint_every == 0 or step == self._total:
                self._save()
        return LoopResult(self._counters, self._best)

    def _train_step(self) -> dict[str, Any]:
        step, recipe = self._counters.step, self._recipe
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout of a step does not depend on how it was reached
        rate = learning_rate_at(recipe, step, self._total)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._method.model.train()
        rows = [self._data.train[i] for i in self._plan.rows(step)]
        loss, num_tokens = train_batch(self._method.model, rows, recipe, self._data.pad_token_id)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters.values(), recipe.max_grad_norm))
        if not (abs(loss) < float("inf") and norm < float("inf")):
            raise TrainingDiverged(
                f"loss {loss} and gradient norm {norm} at step {step + 1}; lower learning_rate ({recipe.learning_rate})"
            )
        self._optimiser.step()
        self._optimiser.zero_grad()
        seconds = time.monotonic() - self._started
        self._counters = replace(
            self._counters, step=step + 1, num_tokens=self._counters.num_tokens + num_tokens, train_seconds=seconds
        )
        self._report("training", loss=loss)
        return {"step": step + 1, "loss": loss, "learning_rate": rate, "gradient_norm": norm, "seconds": seconds}

    def _evaluate(self, metrics: dict[str, Any]) -> None:
        step = self._counters.step
        self._report("evaluating")
        target = self._mean_loss(self._data.target)
        general = self._mean_loss(self._data.general)
        if not (abs(target) < float("inf") and abs(general) < float("inf")):
            raise TrainingDiverged(
                f"held-out loss {target} and general loss {general} at step {step}; lower learning_rate"
            )
        best = self._counters.best_loss
        if best is None or target < best:
            self._best = {name: p.detach().cpu().clone() for name, p in self._parameters.items()}
            self._counters = replace(self._counters, best_step=step, best_loss=target, num_worse=0)
        else:
            self._counters = replace(self._counters, num_worse=self._counters.num_worse + 1)
        self._folder.add_metrics({"step": step, **metrics, "eval_loss": target, "general_loss": general})
        self._report("training", eval_loss=target)

    def _mean_loss(self, rows: Sequence[EncodedExample]) -> float:
        return mean_loss(
            self._method.model,
            rows,
            batch_size=self._recipe.micro_batch_size or self._recipe.batch_size,
            pad_token_id=self._data.pad_token_id,
            precision=self._recipe.precision,
        )

    def _is_out_of_patience(self) -> bool:
        return self._recipe.patience is not None and self._counters.num_worse >= self._recipe.patience

    def _save(self) -> None:
        state = pack(self._counters, self._parameters, self._optimiser, self._best, self._method.structure())
        write_checkpoint(self._folder.checkpoints, state)

    def _report(self, phase: str, loss: float | None = None, eval_loss: float | None = None) -> None:
        counters = self._counters
        rate = counters.num_tokens / counters.train_seconds if counters.train_seconds else 0.0
        left = counters.train_seconds / counters.step * (self._total - counters.step) if counters.step else None
        self._on_progress(Progress(phase, counters.step, self._total, loss, eval_loss, rate, left))
