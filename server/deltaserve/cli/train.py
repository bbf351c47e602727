"""``deltaserve train`` and ``deltaserve evaluate``: from a data file to a measured, and perhaps served, adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve.cli.base_choice import base_folder, base_name
from deltaserve.config import DEFAULT_STORE
from deltaserve.errors import ConfigError

if TYPE_CHECKING:
    from deltaserve_trainer.base import Base
    from deltaserve_trainer.evaluate import Evaluation

Model = Annotated[str | None, typer.Option(help="Checkpoint folder; default: the embedded base.")]
General = Annotated[Path | None, typer.Option(help="JSONL of general text, to measure forgetting.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def train(
    data: Annotated[Path, typer.Option(help="JSONL: chat messages, prompt/completion, or text.")],
    name: Annotated[str, typer.Option(help="Name of the run, and of the adapter.")],
    method: Annotated[str, typer.Option(help="lora or sparse.")] = "lora",
    model: Model = None,
    preset: Annotated[str, typer.Option(help="quick, balanced or quality.")] = "balanced",
    sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe (repeatable).")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="Held-out JSONL; default: a part of --data.")] = None,
    general_data: General = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    register: Annotated[bool, typer.Option("--register", help="Send it through the door.")] = False,
    server: Annotated[str | None, typer.Option(help="URL of the server to register with.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DELTASERVE_API_KEY", help="Its API key.")] = None,
    store: Annotated[Path, typer.Option(help="Store to register with when no server runs.")] = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Train an adapter: data check, training, evaluation against the base, and on request the door."""
    from deltaserve.cli.training_view import TrainingView
    from deltaserve_store.names import validate_name
    from deltaserve_trainer.errors import TrainingInterrupted
    from deltaserve_trainer.recipe import resolve_recipe
    from deltaserve_trainer.train import run_training

    validate_name(name)
    recipe = resolve_recipe(preset, {"method": method, **_overrides(sets or ())})
    base = identify_base(model)
    view = TrainingView(is_quiet=as_json)
    view.show_recipe(recipe, preset)
    try:
        with view:
            result = run_training(
                recipe,
                base=base,
                data=data,
                out_dir=out or Path("runs") / name,
                eval_data=eval_data,
                general_data=general_data,
                resume=resume,
                title=name,
                on_data=view.show_data,
                on_progress=view.show_progress,
            )
    except TrainingInterrupted as stopped:
        typer.echo(f"\n{stopped}; the run is kept in {stopped.run_folder}", err=True)
        raise typer.Exit(stopped.exit_code) from None
    view.show_result(result)
    report: dict[str, Any] = {
        "run": str(result.run_folder),
        "adapter": str(result.adapter_folder),
        "evaluation": result.evaluation.to_json(),
    }
    if register:
        from deltaserve.cli.registration import register_result

        report["registered"] = register_result(
            result, name=name, model=model, server=server, api_key=api_key, store=store, say=view.say
        )
    if as_json:
        typer.echo(json.dumps(report))


def evaluate(
    adapter: Annotated[Path, typer.Option(help="Adapter folder.")],
    data: Annotated[Path, typer.Option(help="Held-out JSONL.")],
    model: Model = None,
    general_data: General = None,
    max_rows: Annotated[int, typer.Option(help="Rows to measure, at most.")] = 256,
    as_json: Json = False,
) -> None:
    """Measure an adapter folder against the base: gain on --data, forgetting on --general-data."""
    from deltaserve.cli.training_view import TrainingView
    from deltaserve_trainer.evaluate import evaluate_adapter

    if not adapter.is_dir():
        raise ConfigError(f"--adapter {adapter} is not a folder.")
    if max_rows < 1:
        raise ConfigError(f"--max-rows is {max_rows}; it must be at least 1.")
    evaluation: Evaluation = evaluate_adapter(
        identify_base(model), adapter, data, general_data=general_data, max_rows=max_rows
    )
    if as_json:
        typer.echo(json.dumps(evaluation.to_json()))
        return
    TrainingView(is_quiet=False).show_evaluation(evaluation)


def identify_base(model: str | None) -> Base:
    """Folder, name and fingerprint of the base, as the server that holds it would report them."""
    from deltaserve.model.identify import identify
    from deltaserve_trainer.base import Base

    folder = base_folder(model)
    return Base(folder, base_name(model), identify(folder))


def _overrides(items: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """``lora.rank=8`` to ``{"lora.rank": 8}``: values are JSON where they parse as such, else text."""
    found: dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {item!r}: write KEY=VALUE, for example lora.rank=8.")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found
