"""``deltaserve keys``: API keys, printed once and kept as digests."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="API keys: add, list, revoke.", no_args_is_help=True)
KeyFile = Annotated[Path, typer.Option("--file", help="The key file; the server gets it as --api-keys.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@app.command()
def add(
    file: KeyFile = Path("keys.json"),
    name: Annotated[str, typer.Option(help="A label for you.")] = "",
    tenant: Annotated[str, typer.Option(help="Whose adapters the key sees.")] = "default",
    scopes: Annotated[str, typer.Option(help="Comma-separated: use, upload, admin.")] = "use",
    as_json: Json = False,
) -> None:
    """Make a key and print it: the only time it can be read."""
    from deltaserve.api.keys import KeyRing

    ring = KeyRing.load(file, must_exist=False)
    key = ring.add(label=name, tenant=tenant, scopes=[scope.strip() for scope in scopes.split(",")])
    record = ring.records[-1]
    if as_json:
        typer.echo(json.dumps({"id": record.id, "key": key, "tenant": tenant, "scopes": list(record.scopes)}))
        return
    typer.echo(key)
    typer.echo(f"id {record.id}, tenant {tenant}, may {', '.join(record.scopes)}; it is not shown again.", err=True)


@app.command("list")
def list_keys(file: KeyFile = Path("keys.json"), as_json: Json = False) -> None:
    """Show ids, labels, tenants and scopes; never the keys."""
    from deltaserve.api.keys import KeyRing

    records = KeyRing.load(file).records
    if as_json:
        shown = [
            {"id": r.id, "label": r.label, "tenant": r.tenant, "scopes": list(r.scopes), "created_at": r.created_at}
            for r in records
        ]
        typer.echo(json.dumps(shown))
        return
    for r in records:
        made = time.strftime("%Y-%m-%d", time.localtime(r.created_at))
        typer.echo(f"{r.id}  {r.tenant:<16} {','.join(r.scopes):<18} {made}  {r.label}")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="Id as `deltaserve keys list` shows it.")],
    file: KeyFile = Path("keys.json"),
) -> None:
    """Remove a key; a running server refuses it from its next request on."""
    from deltaserve.api.keys import KeyRing

    record = KeyRing.load(file).revoke(key_id)
    typer.echo(f"revoked {record.id} ({record.label or 'no label'})")
