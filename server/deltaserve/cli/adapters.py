"""``deltaserve adapters``: add, import, list, show, remove, alias, rollback; ``cli`` adds merge, extract, rebase."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve.config import DEFAULT_STORE
from deltaserve.errors import InvalidRequest

if TYPE_CHECKING:
    from deltaserve.admission.importer import Verdict

app = typer.Typer(help="Adapters: add, list, change, merge, extract, rebase.", no_args_is_help=True)
Server = Annotated[str | None, typer.Option(help="URL; default: whoever holds the store, else this process.")]
Store = Annotated[Path, typer.Option(help="Folder of the adapters.")]
ApiKey = Annotated[str | None, typer.Option(envvar="DELTASERVE_API_KEY", help="Where the server asks for one.")]
Model = Annotated[str | None, typer.Option(help="Base folder, when no server runs; default: the embedded base.")]
AcceptBase = Annotated[bool, typer.Option("--accept-base", help="Waive the base's name; listings show it.")]
AcceptNoEffect = Annotated[bool, typer.Option("--accept-no-effect", help="Waive that it must change something.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
COLUMNS = ("id", "version", "kinds", "rank", "bytes", "state", "effect", "waivers")


@app.command()
def add(
    path: Annotated[Path, typer.Argument(help="Adapter folder, or one .zip, .tar or .tar.gz.")],
    name: Annotated[str, typer.Option(help="Its name in requests; an existing name gets a new version.")],
    expected_version: Annotated[str | None, typer.Option(help="Refuse unless the name is at this version.")] = None,
    accept_base: AcceptBase = False,
    accept_no_effect: AcceptNoEffect = False,
    server: Server = None,
    store: Store = DEFAULT_STORE,
    model: Model = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Send one adapter through the door: checked, folded, proven, committed."""
    from deltaserve.admission.folders import adapter_files
    from deltaserve.cli.connection import find_server

    waived = {"accept_base": accept_base, "accept_no_effect": accept_no_effect}
    remote = find_server(server, store, api_key)
    if remote is not None:
        sent = adapter_files(path)[0] if path.is_dir() else path
        answer = remote.upload(sent, name, expected_version=expected_version, **waived)
    else:
        from deltaserve.cli.local_door import admit_here

        answer = asyncio.run(admit_here(path, name, store, model, expected_version=expected_version, **waived))
    if as_json:
        typer.echo(json.dumps(answer))
        return
    typer.echo(f"{name}: {'added' if answer['created'] else 'already there'}, version {answer['version'][:12]}")
    if path.is_dir() and (left_behind := adapter_files(path)[1]):
        typer.echo(f"  not sent, not part of the adapter: {', '.join(left_behind)}", err=True)
    for warning in answer.get("warnings") or ():
        typer.echo(f"  warning: {warning}", err=True)


@app.command("import")
def import_(
    directory: Annotated[Path, typer.Argument(help="Folder of adapter folders, at any depth.")],
    prefix: Annotated[str, typer.Option(help="Put before each name.")] = "",
    accept_base: AcceptBase = False,
    accept_no_effect: AcceptNoEffect = False,
    server: Server = None,
    store: Store = DEFAULT_STORE,
    model: Model = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Send every adapter folder below DIRECTORY through the door; run it again to resume."""
    from dataclasses import asdict

    from deltaserve.admission.importer import Outcome
    from deltaserve.cli.connection import find_server
    from deltaserve.cli.local_door import import_here, import_there

    if not directory.is_dir():
        raise InvalidRequest(f"{directory.name!r} is not a folder.", param="directory")
    waived = {"accept_base": accept_base, "accept_no_effect": accept_no_effect}
    remote = find_server(server, store, api_key)
    if remote is not None:
        verdicts = import_there(remote, directory, prefix=prefix, **waived)
    else:
        verdicts = import_here(directory, store, model, prefix=prefix, **waived)

    async def show() -> list[Verdict]:
        seen = []
        async for verdict in verdicts:
            seen.append(verdict)
            typer.echo(json.dumps(asdict(verdict)) if as_json else _verdict_line(verdict))
        return seen

    seen = asyncio.run(show())
    refused = sum(verdict.outcome is Outcome.REFUSED for verdict in seen)
    counts = {outcome: sum(v.outcome is outcome for v in seen) for outcome in Outcome}
    typer.echo(", ".join(f"{count} {outcome.value}" for outcome, count in counts.items()), err=True)
    if refused:
        raise typer.Exit(1)


@app.command("list")
def list_adapters(
    server: Server = None, store: Store = DEFAULT_STORE, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """List every adapter with its current version and state."""
    from deltaserve.cli.connection import adapters

    with adapters(server, store, api_key) as found:
        _show_table(found.list(), as_json)


@app.command()
def show(
    name: str, server: Server = None, store: Store = DEFAULT_STORE, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """Show one adapter and all its versions, newest first."""
    from deltaserve.cli.connection import adapters

    with adapters(server, store, api_key) as found:
        one = found.show(name)
        versions = list(found.versions(one["id"]))
    if as_json:
        typer.echo(json.dumps({**one, "versions": versions}))
        return
    for key, value in one.items():
        typer.echo(f"{key:<16} {value if not isinstance(value, list | tuple) else ', '.join(map(str, value))}")
    typer.echo("")
    _show_table(versions, False)


@app.command()
def remove(name: str, server: Server = None, store: Store = DEFAULT_STORE, api_key: ApiKey = None) -> None:
    """Forget a name or an alias; requests that use it finish first."""
    from deltaserve.cli.connection import adapters

    with adapters(server, store, api_key) as found:
        found.delete(name)
    typer.echo(f"{name}: removed (its bytes go with `deltaserve store gc`)")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="The alias.")],
    target: Annotated[str, typer.Argument(help="Adapter name, which it follows, or name@version.")],
    server: Server = None,
    store: Store = DEFAULT_STORE,
    api_key: ApiKey = None,
) -> None:
    """Point an alias at an adapter; requests already running keep what they have."""
    from deltaserve.cli.connection import adapters

    with adapters(server, store, api_key) as found:
        found.alias(name, target)
    typer.echo(f"{name} -> {target}")


@app.command()
def rollback(
    name: str,
    version: Annotated[str | None, typer.Option(help="Digest or prefix; default: the one before.")] = None,
    server: Server = None,
    store: Store = DEFAULT_STORE,
    api_key: ApiKey = None,
) -> None:
    """Move a name back to an earlier version."""
    from deltaserve.cli.connection import adapters

    with adapters(server, store, api_key) as found:
        answer = found.rollback(name, version)
    typer.echo(f"{name}: now at version {answer['version'][:12]}")


def _show_table(found: Iterable[dict[str, Any]], as_json: bool) -> None:
    rows = list(found)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in ("rank", "bytes", "effect") else "left")
    for row in rows:
        table.add_row(*(_cell(column, row.get(column)) for column in COLUMNS))
    Console(highlight=False).print(table if rows else "no adapters")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column == "version":
        return str(value)[:12]
    if column == "effect":
        return f"{value:.3g}"
    if column == "bytes":
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _verdict_line(verdict: Verdict) -> str:
    told = verdict.version[:12] if verdict.version else verdict.message
    line = f"{verdict.outcome.value:<9} {verdict.name:<32} {told}"
    for warning in verdict.warnings:
        line += f"\n          warning: {warning}"
    for reason in verdict.reasons:
        line += f"\n          {reason.code} at {reason.where}: found {reason.found}; allowed {reason.allowed}"
    return line
