"""``deltaserve adapters extract``: a full fine-tune becomes an adapter of a chosen size."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve.config import DEFAULT_STORE
from deltaserve.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from deltaserve.cli.workbench import Workbench
    from deltaserve_trainer.extraction.extract import Extraction

Opt = typer.Option
DTYPES = ("float16", "bfloat16", "float32")


def extract(
    tuned: Annotated[Path, Opt(help="Checkpoint folder of the fine-tune.")],
    budget: Annotated[str, Opt(help="Bytes of the adapter's files, as 150MB.")],
    out: Annotated[str, Opt(help="Name of the adapter; an existing name gets a new version.")],
    base: Annotated[str | None, Opt(help="Checkpoint folder of the base; default: the embedded base.")] = None,
    text: Annotated[Path | None, Opt(help="Held-out JSONL for the curve; default: bundled text.")] = None,
    max_rows: Annotated[int, Opt(help="Rows of the text, at most.")] = 32,
    dtype: Annotated[str, Opt(help="Of stored matrices: float16, bfloat16 or float32.")] = "float16",
    run_dir: Annotated[Path | None, Opt(help="For plot, table and files; default: runs/OUT.")] = None,
    server: Annotated[str | None, Opt(help="URL; default: whoever holds the store.")] = None,
    store: Annotated[Path, Opt(help="Folder of the adapters.")] = DEFAULT_STORE,
    api_key: Annotated[str | None, Opt(envvar="DELTASERVE_API_KEY", help="The server's.")] = None,
    as_json: Annotated[bool, Opt("--json", help="Machine-readable output.")] = False,
) -> None:
    """Turn a full fine-tune into an adapter within a budget, and draw what it costs."""
    from deltaserve.cli.workbench import workbench
    from deltaserve.config import parse_bytes
    from deltaserve_store.names import validate_name
    from deltaserve_trainer.extraction.curve import plot_curve

    validate_name(out)
    size = parse_bytes(budget)
    place = run_dir or Path("runs") / out
    if not (tuned / "config.json").is_file():
        raise ConfigError(f"--tuned {tuned}: no folder with a config.json; give the path of a checkpoint folder.")
    if dtype not in DTYPES:
        raise InvalidRequest(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.", param="dtype")
    if max_rows < 1:
        raise InvalidRequest(f"--max-rows is {max_rows}; it must be at least 1.", param="max_rows")
    if place.exists() and any(place.iterdir()):
        raise InvalidRequest(f"{place} holds files already; give another --run-dir.", param="run_dir")
    with (
        tempfile.TemporaryDirectory(prefix="deltaserve-extract-") as scratch,
        workbench(store, base, server, api_key, Path(scratch)) as bench,
    ):
        found = extract_here(bench, tuned, size, Path(scratch) / "extracted", text=text, max_rows=max_rows, dtype=dtype)
        place.mkdir(parents=True, exist_ok=True)
        _keep(found.folder, place / "adapter")
        (place / "extract.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", "utf-8")
        admitted = bench.admit(found.folder, out, source="extract")
    plot_curve(found, place / "curve.png", title=f"{out}: {tuned.resolve().name} as an adapter")
    if as_json:
        typer.echo(json.dumps({"adapter": admitted, "run": str(place), **found.to_json()}))
        return
    show(found)
    typer.echo(f"curve    {place / 'curve.png'}")
    typer.echo(f"{out}: {'added' if admitted['created'] else 'already there'}, version {admitted['version'][:12]}")


def extract_here(
    bench: Workbench, tuned: Path, budget: int, folder: Path, *, text: Path | None, max_rows: int, dtype: str
) -> Extraction:
    """The adapter and its curve in ``folder``. Both models are held in float32 beside the engine's base."""
    import torch

    from deltaserve_trainer.base import load_model
    from deltaserve_trainer.evaluate import BUNDLED_GENERAL_TEXT
    from deltaserve_trainer.extraction.difference import difference
    from deltaserve_trainer.extraction.extract import extract
    from deltaserve_trainer.merging.update import Update
    from deltaserve_trainer.merging.write import write_update
    from deltaserve_trainer.scoring import divergence, model_logits, read_rows

    base = bench.runtime.base
    rows = read_rows(text or BUNDLED_GENERAL_TEXT, base.folder, max_rows=max_rows, max_length=bench.max_row_tokens)
    prompts = [row.input_ids for row in rows]
    tuned_model = load_model(tuned)
    found = difference(load_model(base.folder), tuned_model, base.spec)
    meant = model_logits(tuned_model, prompts)

    def write(update: Update, place: Path, told: str) -> None:
        method = f"extract of {tuned.resolve().name} in {dtype}, {told}"
        write_update(update, place, base.spec.fingerprint, base_name=bench.runtime.base_names[0], method=method)

    return extract(
        found,
        folder,
        budget,
        dtype=getattr(torch, dtype),
        write=write,
        score=lambda place: divergence(meant, bench.logits(place, prompts)),
        base_divergence=divergence(meant, bench.logits(None, prompts)),
    )


def show(found: Extraction) -> None:
    """The curve, then what each sort of linear got."""
    from rich.console import Console
    from rich.table import Table

    from deltaserve_trainer.extraction.curve import told_bytes

    console = Console(highlight=False)
    curve = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("forms", "budget", "files", "squares kept", "KL, nats per token"):
        curve.add_column(heading, justify="left" if heading == "forms" else "right")
    curve.add_row("no adapter", "-", "-", "-", f"{found.base_divergence:.4g}")
    for point in found.points:
        sizes = told_bytes(point.budget), told_bytes(point.num_bytes)
        curve.add_row(point.forms, *sizes, f"{point.kept:.1%}", f"{point.divergence:.4g}")
    console.print(curve)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("linears", "low rank", "sparse", "nothing", "bytes", "share of change", "error"):
        table.add_column(heading, justify="left" if heading == "linears" else "right")
    for name, row in _by_sort(found).items():
        table.add_row(name, *row)
    console.print(table)
    if found.num_vectors:
        console.print(f"{found.num_vectors} biases and norms are taken whole")
    if found.not_carried:
        names = sorted(found.not_carried, key=lambda name: -found.not_carried[name])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(f"not carried, adapters cannot change them: {', '.join(names[:3])}{more}")


def _by_sort(found: Extraction) -> dict[str, tuple[str, ...]]:
    """Rows of the table: linears that share the last part of their names."""
    sorts: dict[str, list[Any]] = {}
    for row in found.rows:
        sorts.setdefault(row.module.rpartition(".")[2], []).append(row)
    table: dict[str, tuple[str, ...]] = {}
    for name, rows in sorts.items():
        ranks = [row.size for row in rows if row.form == "low rank"]
        entries = [row.size for row in rows if row.form == "sparse"]
        share = sum(row.share for row in rows)
        error = (sum(row.share * row.error**2 for row in rows) / share) ** 0.5
        table[name] = (
            f"{len(ranks)} of rank {_range(ranks)}" if ranks else "-",
            f"{len(entries)} of {_range(entries)}" if entries else "-",
            str(len(rows) - len(ranks) - len(entries)) if len(ranks) + len(entries) < len(rows) else "-",
            f"{sum(row.num_bytes for row in rows):,}",
            f"{share:.1%}",
            f"{error:.3f}",
        )
    return table


def _range(sizes: list[int]) -> str:
    return f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"


def _keep(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)
