"""``deltaserve adapters rebase``: an adapter of one base is carried to another, and measured on both."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve.config import DEFAULT_STORE
from deltaserve.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from deltaserve.cli.workbench import Source, Workbench
    from deltaserve_store.parsed import ParsedAdapter
    from deltaserve_trainer.merging.update import Update

Opt = typer.Option


def rebase(
    adapter: Annotated[str, typer.Argument(help="Name (name, name@version, alias) or adapter folder.")],
    onto: Annotated[Path, Opt(help="Checkpoint folder of the new base, which is then the served one.")],
    data: Annotated[Path, Opt(help="Held-out JSONL of the adapter's task.")],
    out: Annotated[str, Opt(help="Name of the result; an existing name gets a new version.")],
    model: Annotated[str | None, Opt(help="Folder of the old base; default: the embedded base.")] = None,
    max_rows: Annotated[int, Opt(help="Rows of --data, at most.")] = 64,
    accept_worse: Annotated[bool, Opt("--accept-worse", help="Also when it does not beat the bare new base.")] = False,
    accept_base: Annotated[bool, Opt("--accept-base", help="A folder that names another old base.")] = False,
    server: Annotated[str | None, Opt(help="URL; default: whoever holds the store.")] = None,
    store: Annotated[Path, Opt(help="Folder of the adapters.")] = DEFAULT_STORE,
    api_key: Annotated[str | None, Opt(envvar="DELTASERVE_API_KEY", help="The server's.")] = None,
    as_json: Annotated[bool, Opt("--json", help="Machine-readable output.")] = False,
) -> None:
    """Carry an adapter to another base, with scores before and after, and send it through that base's door."""
    from deltaserve.cli.base_choice import base_folder
    from deltaserve.cli.connection import find_server
    from deltaserve.cli.workbench import check_door, find_sources, workbench
    from deltaserve.model.identify import identify
    from deltaserve_store.names import validate_name

    validate_name(out)
    if not (onto / "config.json").is_file():
        raise ConfigError(f"--onto {onto}: no folder with a config.json; give the path of a checkpoint folder.")
    if max_rows < 1:
        raise InvalidRequest(f"--max-rows is {max_rows}; it must be at least 1.", param="max_rows")
    if identify(base_folder(model)) == identify(onto):
        raise InvalidRequest("--onto is the old base, bit for bit; there is nothing to carry over.", param="onto")
    if (door := find_server(server, store, api_key)) is not None:
        check_door(door, identify(onto))
    with tempfile.TemporaryDirectory(prefix="deltaserve-rebase-") as place:
        scratch = Path(place)
        (source,) = find_sources([adapter], store, scratch)
        with workbench(scratch / "old", model, None, None, scratch) as bench:
            parsed = bench.read(source, accept_base=accept_base)
            update, before = _before(bench, source, parsed, data, max_rows)
            old_folder, old_fingerprint = bench.runtime.base.folder, bench.runtime.base.spec.fingerprint
        with workbench(store, str(onto), server, api_key, scratch) as bench:
            report = before | _after(bench, source, parsed, update, old_folder, old_fingerprint, data, max_rows)
            _check_gain(report, accept_worse=accept_worse)
            admitted = bench.admit(scratch / "rebased", out, source="rebase")
    if as_json:
        typer.echo(json.dumps({"adapter": admitted, **report}))
        return
    show(report)
    typer.echo(f"{out}: {'added' if admitted['created'] else 'already there'}, version {admitted['version'][:12]}")


def _before(
    bench: Workbench, source: Source, parsed: ParsedAdapter, data: Path, max_rows: int
) -> tuple[Update, dict[str, Any]]:
    """The delta as a sum, and the losses on the old base."""
    from deltaserve_trainer.merging.write import write_update
    from deltaserve_trainer.scoring import read_rows

    base = bench.runtime.base
    update = bench.update(source, parsed)
    written = bench.scratch / "before"
    write_update(update, written, base.spec.fingerprint, base_name=None, method="as it was")
    rows = read_rows(data, base.folder, max_rows=max_rows, max_length=bench.max_row_tokens)
    losses = {"old_base": bench.loss(None, rows), "old_adapter": bench.loss(written, rows)}
    return update, {"parent": source.told, "losses": losses}


def _after(
    bench: Workbench,
    source: Source,
    parsed: ParsedAdapter,
    update: Update,
    old_folder: Path,
    old_fingerprint: str,
    data: Path,
    max_rows: int,
) -> dict[str, Any]:
    """Write the rebased files and measure them and the way between the bases; adds to the report of ``_before``."""
    from deltaserve_trainer.base import load_model
    from deltaserve_trainer.encoding import Encoder
    from deltaserve_trainer.merging.write import write_update
    from deltaserve_trainer.rebase import check_fit, relation
    from deltaserve_trainer.scoring import read_rows

    base = bench.runtime.base
    check_fit(update, base.spec)
    rows = read_rows(data, base.folder, max_rows=max_rows, max_length=bench.max_row_tokens)
    pad = Encoder.from_folder(base.folder, bench.max_row_tokens).pad_token_id
    found = relation(load_model(old_folder), load_model(base.folder), rows, pad_token_id=pad)
    has_same_tokens = _tokenizer(old_folder) == _tokenizer(base.folder)
    folder = bench.scratch / "rebased"
    write_update(
        update,
        folder,
        base.spec.fingerprint,
        base_name=bench.runtime.base_names[0],
        method=f"rebase of {source.told} from base {old_fingerprint[:12]} ({old_folder.name})",
        chat_template=parsed.chat_template,
        stop_token_ids=parsed.stop_token_ids if has_same_tokens else (),
    )
    return {
        "new_losses": {"new_base": bench.loss(None, rows), "new_adapter": bench.loss(folder, rows)},
        "similarity": found.similarity,
        "line": list(found.line),
        "barrier": found.barrier,
        "is_near": found.is_near,
        "has_same_tokens": has_same_tokens,
    }


def _check_gain(report: dict[str, Any], *, accept_worse: bool) -> None:
    from deltaserve_trainer.errors import GateRefused

    losses = report["new_losses"]
    if not accept_worse and not losses["new_adapter"] < losses["new_base"]:
        raise GateRefused(
            f"on the new base the held-out loss is {losses['new_adapter']:.4f} with the adapter and "
            f"{losses['new_base']:.4f} without (bases: cosine {report['similarity']:.3f}, barrier "
            f"{report['barrier']:.3f}). Nothing was registered; train anew, or send --accept-worse"
        )


def show(report: dict[str, Any]) -> None:
    """Scores before and after, and how near the bases are."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("held-out loss, nats per token", "bare base", "with the adapter", "change"):
        table.add_column(heading, justify="left" if heading.startswith("held") else "right")
    old, new = report["losses"], report["new_losses"]
    for name, bare, with_it in (
        ("old base", old["old_base"], old["old_adapter"]),
        ("new base", new["new_base"], new["new_adapter"]),
    ):
        table.add_row(name, f"{bare:.4f}", f"{with_it:.4f}", f"{with_it - bare:+.4f}")
    console.print(table)
    line = ", ".join(f"{loss:.3f}" for loss in report["line"])
    console.print(f"bases    cosine of weights {report['similarity']:.4f}; loss on the line between them {line}")
    if not report["is_near"]:
        console.print(
            "warning  the bases are not near each other: what the delta meant on the old one it need not mean here"
        )
    if not report["has_same_tokens"]:
        console.print(
            "warning  the tokenizers differ: stop tokens are dropped, losses of old and new count other tokens"
        )


def _tokenizer(folder: Path) -> bytes | None:
    file = folder / "tokenizer.json"
    return file.read_bytes() if file.is_file() else None
