"""``deltaserve store``: housekeeping of the adapters at rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deltaserve.config import DEFAULT_STORE

app = typer.Typer(help="Adapters at rest: gc, verify.", no_args_is_help=True)
Store = Annotated[Path, typer.Option(help="Folder of the adapters; no server may hold it.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@app.command()
def gc(
    store: Store = DEFAULT_STORE,
    keep: Annotated[int, typer.Option(help="Versions kept of each name.")] = 10,
    as_json: Json = False,
) -> None:
    """Remove old versions and those that no name has any more."""
    from deltaserve_store.store import AdapterStore

    AdapterStore.open(store, lock=False).close()
    with AdapterStore.open(store) as opened:
        removed = opened.gc(keep=keep)
    if as_json:
        typer.echo(json.dumps({"versions": list(removed.versions), "bytes": removed.num_bytes}))
    else:
        typer.echo(f"removed {len(removed.versions)} versions, {removed.num_bytes:,} bytes")


@app.command()
def verify(store: Store = DEFAULT_STORE, as_json: Json = False) -> None:
    """Read every stored version back and compare its digest; exit status 1 when one is damaged."""
    from dataclasses import asdict

    from deltaserve_store.store import AdapterStore

    with AdapterStore.open(store, lock=False) as opened:
        found = {version: opened.verify(version) for version in sorted(opened.snapshot().versions())}
    damaged = {version: reasons for version, reasons in found.items() if reasons}
    if as_json:
        shown = {version: [asdict(reason) for reason in reasons] for version, reasons in damaged.items()}
        typer.echo(json.dumps({"num_versions": len(found), "damaged": shown}))
    else:
        for version, reasons in damaged.items():
            typer.echo(f"{version[:12]}  {reasons[0].code} at {reasons[0].where}: found {reasons[0].found}")
        typer.echo(f"{len(found)} versions read, {len(damaged)} damaged")
    if damaged:
        raise typer.Exit(1)
