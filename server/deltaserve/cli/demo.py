"""``deltaserve demo``: two adapters trained, measured, proven, registered, and asked together in one mixed batch."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaserve.config import ServeConfig

if TYPE_CHECKING:
    from rich.console import Console

    from deltaserve.runtime import Runtime
    from deltaserve_trainer.demos import Demo
    from deltaserve_trainer.tour import Tour

MAX_TOKENS = 96


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the tour's own store.")] = Path("runs/demo"),
) -> None:
    """The guided tour: train a LoRA and a sparse adapter, register them, compare all answers in one batch."""
    from rich.console import Console

    from deltaserve.cli.registration import register_here
    from deltaserve.cli.train import identify_base
    from deltaserve.cli.training_view import TrainingView
    from deltaserve.runtime import Runtime
    from deltaserve_trainer.errors import TrainingInterrupted
    from deltaserve_trainer.tour import run_tour
    from deltaserve_trainer.train import TrainingResult

    console = Console(highlight=False)
    began = time.monotonic()
    store = out / "store"
    with asyncio.Runner() as loop:
        runtime = Runtime.open(ServeConfig(store=store, demo_adapters=False, drain_seconds=0.0))
        loop.run(runtime.start())
        view = TrainingView(is_quiet=False, console=console)

        def announce(chapter: Demo, name: str) -> None:
            console.print(f"\n[bold]{name}[/bold]: {chapter.says}")
            view.restart()

        def register(result: TrainingResult, name: str) -> None:
            view.stop()
            view.show_result(result)
            register_here(loop, runtime, result, name, view.say)

        try:
            console.print("Two adapters for the embedded base, from bundled data to one mixed batch.")
            tour = run_tour(
                base=identify_base(None),
                work_folder=out,
                register=register,
                answer_batch=lambda asked: loop.run(answer_together(runtime, asked)),
                on_demo=announce,
                on_data=view.show_data,
                on_progress=view.show_progress,
            )
        except TrainingInterrupted as stopped:
            view.stop()
            console.print(f"\n{stopped}: run `deltaserve demo` again to continue.")
            raise typer.Exit(stopped.exit_code) from None
        finally:
            view.stop()
            loop.run(runtime.close())
    show_answers(console, tour)
    console.print(f"\n{time.monotonic() - began:.0f} s in all. Serve them: deltaserve serve --store {store}")


async def answer_together(runtime: Runtime, asked: list[tuple[str, str]]) -> list[str]:
    """Greedy answers to (model, question) rows, submitted at once so that the engine decodes them as one batch."""
    from deltaserve.core import Binding, BindingPart, FinishReason, GenerationRequest, SamplingParams
    from deltaserve_store.names import DEFAULT_TENANT

    async def answer(index: int, model: str, question: str) -> str:
        ids = runtime.tokenizer.render_chat([{"role": "user", "content": question}])
        version = runtime.engine.resolve(DEFAULT_TENANT, model).version
        request = GenerationRequest(
            request_id=f"demo-{index}",
            prompt_ids=tuple(ids),
            sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
            binding=Binding() if version is None else Binding((BindingPart(version),)),
            eos_token_ids=runtime.tokenizer.eos_token_ids,
        )
        tokens: list[int] = []
        reason = None
        async for output in runtime.engine.submit(request):
            for delta in output.deltas:
                tokens += delta.token_ids
                reason = delta.finish_reason or reason
        text = runtime.tokenizer.decode(tokens)
        return text + (" ..." if reason is FinishReason.LENGTH else "")

    for model in dict.fromkeys(model for model, _ in asked):  # resident first, so that all rows start together
        version = runtime.engine.resolve(DEFAULT_TENANT, model).version
        if version is not None:
            await runtime.engine.preload(version)
    return list(await asyncio.gather(*(answer(i, model, question) for i, (model, question) in enumerate(asked))))


def show_answers(console: Console, tour: Tour) -> None:
    """One table: a row a prompt, a column a model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title="\nThe same prompts, decoded in one mixed batch", title_justify="left")
    table.add_column("prompt", style="dim", ratio=2)
    for model in tour.models:
        table.add_column(model, ratio=3)
    for row in tour.rows:
        table.add_row(Text(row.prompt), *(Text(answer) for answer in row.answers))
    console.print(table)
    for model, shown in zip(tour.models[1:], tour.shows[1:], strict=True):
        console.print(f"{model}: {shown} of {len(tour.rows)} answers show what it was trained to do")
