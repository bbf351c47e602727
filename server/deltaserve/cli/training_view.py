"""What a training run looks like on a terminal: the recipe, the data check, a progress bar, the result."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from deltaserve_trainer.evaluate import Evaluation
    from deltaserve_trainer.progress import Progress as TrainingProgress
    from deltaserve_trainer.recipe import Recipe
    from deltaserve_trainer.report import DataReport
    from deltaserve_trainer.train import TrainingResult


class TrainingView:
    """Draws on stderr, so that stdout stays free for ``--json``. ``is_quiet`` draws nothing."""

    def __init__(self, *, is_quiet: bool, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=is_quiet, highlight=False)
        self._tasks: dict[str, TaskID] = {}
        self._bar = self._new_bar()

    def __enter__(self) -> TrainingView:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def restart(self) -> None:
        """A fresh bar for the next run."""
        self.stop()
        self._tasks.clear()
        self._bar = self._new_bar()
        self._bar.start()

    def stop(self) -> None:
        """Leave the bar as it stands; idempotent."""
        self._bar.stop()

    def _new_bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[told]}"),
            console=self.console,
        )

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def show_recipe(self, recipe: Recipe, preset: str) -> None:
        own = getattr(recipe, recipe.method).model_dump(exclude_defaults=False, mode="json")
        told = ", ".join(f"{key} {value}" for key, value in own.items() if value not in (None, {}, False, 0.0))
        length = f"{recipe.max_steps} steps" if recipe.max_steps else f"{recipe.epochs:g} epochs"
        self.say(
            f"recipe   {preset}: {recipe.method} ({told}), {length}, batch {recipe.batch_size}, "
            f"learning rate {recipe.learning_rate:g}, {recipe.precision}"
        )

    def show_data(self, report: DataReport) -> None:
        self.say(
            f"data     {report.format}: {report.num_train_rows} rows to train on ({report.num_train_tokens} tokens), "
            f"{report.num_eval_rows} held out; {report.masked_token_share:.0%} of the tokens carry no loss (prompts)"
        )
        for warning in report.warnings:
            self.console.print(f"[yellow]warning[/yellow]  {warning}")
        if report.samples:
            row = Text("a row    ")
            for segment in report.samples[0]:
                row.append(segment.text.replace("\n", "\\n"), style="green" if segment.is_trained else "dim")
            row.truncate(4 * self.console.width)
            self.console.print(row)

    def show_progress(self, progress: TrainingProgress) -> None:
        if progress.phase not in self._tasks:
            self._tasks[progress.phase] = self._bar.add_task(progress.phase, total=progress.total_steps, told="")
        told = []
        if progress.loss is not None:
            told.append(f"loss {progress.loss:.3f}")
        if progress.eval_loss is not None:
            told.append(f"held-out {progress.eval_loss:.3f}")
        if progress.tokens_per_second:
            told.append(f"{progress.tokens_per_second:,.0f} tokens/s")
        if progress.seconds_left is not None:
            told.append(f"{int(progress.seconds_left) // 60}:{int(progress.seconds_left) % 60:02d} left")
        task = self._tasks[progress.phase]
        self._bar.update(task, completed=progress.step, total=progress.total_steps, told="  ".join(told))

    def show_evaluation(self, evaluation: Evaluation) -> None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("nats per token", "base", "adapter", "change"):
            table.add_column(heading, justify="left" if heading == "nats per token" else "right")
        table.add_row(
            f"target, {evaluation.num_target_rows} rows held out",
            f"{evaluation.base_target:.3f}",
            f"{evaluation.adapter_target:.3f}",
            f"{-evaluation.gain:+.3f}",
        )
        if evaluation.forgetting is not None:
            table.add_row(
                f"general text, {evaluation.num_general_rows} rows",
                f"{evaluation.base_general:.3f}",
                f"{evaluation.adapter_general:.3f}",
                f"{evaluation.forgetting:+.3f}",
            )
        self.console.print(table)

    def show_result(self, result: TrainingResult) -> None:
        self.say(
            f"trained  {result.num_steps} steps, {result.num_tokens:,} tokens in {result.train_seconds:.0f} s; "
            f"best at step {result.best_step}; {result.num_entries:,} numbers in the adapter"
        )
        self.show_evaluation(result.evaluation)
        self.say(f"adapter  {result.adapter_folder}")
        self.say(f"curve    {result.plot}")
