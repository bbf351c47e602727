"""The ``deltaserve`` command. Nothing heavy is imported before a command runs, so ``--help`` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from deltaserve import __version__
from deltaserve.cli import adapters, demo, extract, keys, merge, rebase, serve, store, train

app = typer.Typer(
    name="deltaserve",
    help="One frozen base model, thousands of its fine-tunes, one batch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("evaluate")(train.evaluate)
app.command("demo")(demo.demo)
adapters.app.command("merge")(merge.merge)
adapters.app.command("extract")(extract.extract)
adapters.app.command("rebase")(rebase.rebase)
app.add_typer(adapters.app, name="adapters")
app.add_typer(store.app, name="store")
app.add_typer(keys.app, name="keys")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. An error that we raised on purpose, or a path that cannot be used, is one line on stderr and exit
    status 1, never a traceback."""
    try:
        app(arguments)
    except OSError as failure:
        if failure.strerror is None:
            raise
        where = f": {failure.filename}" if failure.filename is not None else ""
        sys.stderr.write(f"deltaserve: {failure.strerror}{where}\n")
        raise SystemExit(1) from None
    except Exception as failure:
        if not is_ours(failure):
            raise
        sys.stderr.write(f"deltaserve: {failure}\n")
        for reason in getattr(failure, "reasons", ()):
            sys.stderr.write(f"  {reason.code} at {reason.where}: found {reason.found}; allowed {reason.allowed}\n")
        raise SystemExit(1) from None


def is_ours(failure: Any) -> bool:
    """Typed errors of ours carry a code and a status (``deltaserve.errors``, the store's and the trainer's own)."""
    return hasattr(failure, "code") and hasattr(failure, "status") and type(failure).__module__.startswith("deltaserve")
