"""``deltaserve adapters extract``: a full fine-tune becomes an adapter of a chosen size."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
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
MEASURES = ("outputs", "weights")
CALIBRATION_ROWS = 128
BITS = (8, 4, 3, 2)


def extract(
    tuned: Annotated[Path, Opt(help="Checkpoint folder of the fine-tune.")],
    budget: Annotated[str, Opt(help="Bytes of the adapter's files, as 150MB.")],
    out: Annotated[str, Opt(help="Name of the adapter; an existing name gets a new version.")],
    base: Annotated[str | None, Opt(help="Checkpoint folder of the base; default: the embedded base.")] = None,
    text: Annotated[Path | None, Opt(help="Held-out JSONL for the curve; default: bundled text.")] = None,
    max_rows: Annotated[int, Opt(help="Rows of the text, at most.")] = 32,
    measure: Annotated[
        str, Opt(help="What errors are counted in: outputs of linears on calibration text, or weights.")
    ] = "outputs",
    calibration: Annotated[
        Path | None, Opt(help="JSONL of the task for --measure outputs; default: text that the curve does not use.")
    ] = None,
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
    for option, folder in (("--tuned", tuned), ("--base", base)):
        if folder is not None and not (Path(folder) / "config.json").is_file():
            raise ConfigError(f"{option} {folder}: no folder with a config.json; give the path of a checkpoint folder.")
    if dtype not in DTYPES:
        raise InvalidRequest(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.", param="dtype")
    if measure not in MEASURES:
        raise InvalidRequest(f"--measure {measure}: choose one of {', '.join(MEASURES)}.", param="measure")
    if calibration is not None and measure != "outputs":
        raise InvalidRequest("--calibration has no part in --measure weights; leave one out.", param="calibration")
    if max_rows < 1:
        raise InvalidRequest(f"--max-rows is {max_rows}; it must be at least 1.", param="max_rows")
    if find_spec("matplotlib") is None:
        raise ConfigError("The curve needs matplotlib, which is not installed: pip install 'deltaserve[train]'.")
    if place.exists() and any(place.iterdir()):
        raise InvalidRequest(f"{place} holds files already; give another --run-dir.", param="run_dir")
    with (
        tempfile.TemporaryDirectory(prefix="deltaserve-extract-") as scratch,
        workbench(store, base, server, api_key, Path(scratch)) as bench,
    ):
        asked = Texts(text, max_rows, calibration, counts_outputs=measure == "outputs")
        found = extract_here(bench, tuned, size, Path(scratch) / "extracted", asked, dtype=dtype)
        place.mkdir(parents=True, exist_ok=True)
        _keep(found.folder, place / "adapter")
        (place / "extract.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", "utf-8")
        plot_curve(found, place / "curve.png", title=f"{out}: {tuned.resolve().name} as an adapter")
        # Last: what was measured is there whatever the door says.
        admitted = bench.admit(found.folder, out, source="extract")
    if as_json:
        typer.echo(json.dumps({"adapter": admitted, "run": str(place), **found.to_json()}))
        return
    show(found)
    typer.echo(f"curve    {place / 'curve.png'}")
    typer.echo(f"{out}: {'added' if admitted['created'] else 'already there'}, version {admitted['version'][:12]}")


@dataclass(frozen=True, slots=True)
class Texts:
    """What the curve is measured on, and what the activations are from."""

    text: Path | None
    max_rows: int
    calibration: Path | None
    counts_outputs: bool

    def prompts(self, base_folder: Path, max_length: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of both. Rows that the curve uses are not calibrated on unless a file is named for that: the curve
        would tell too well of other text. Nor is text of something else: none of it helps. Raises ``DataInvalid``."""
        from deltaserve_trainer.evaluate import BUNDLED_GENERAL_TEXT
        from deltaserve_trainer.scoring import read_rows

        def rows(path: Path, count: int) -> list[list[int]]:
            read = read_rows(path, base_folder, max_rows=count, max_length=max_length)
            return [list(row.input_ids) for row in read]

        text = self.text or BUNDLED_GENERAL_TEXT
        scored = rows(text, self.max_rows)
        if not self.counts_outputs:
            return scored, []
        if self.calibration is not None:
            return scored, rows(self.calibration, CALIBRATION_ROWS)
        return scored, [ids for ids in rows(text, self.max_rows + CALIBRATION_ROWS) if ids not in scored]


def extract_here(bench: Workbench, tuned: Path, budget: int, folder: Path, texts: Texts, *, dtype: str) -> Extraction:
    """The adapter and its curve in ``folder``. Both models are held in float32 beside the engine's base."""
    import torch

    from deltaserve_store.formats.deltaserve_terms import write_terms_adapter
    from deltaserve_trainer.base import load_model
    from deltaserve_trainer.extraction.activations import moments_of
    from deltaserve_trainer.extraction.difference import difference
    from deltaserve_trainer.extraction.extract import Delta, extract
    from deltaserve_trainer.scoring import divergence, model_logits

    base = bench.runtime.base
    prompts, calibrated = texts.prompts(base.folder, bench.max_row_tokens)
    base_model, tuned_model = load_model(base.folder), load_model(tuned)
    found = difference(base_model, tuned_model, base.spec)
    changed = {name: found.linears[name] for name in found.changed()}
    sides = [
        (model, {name: pair[side] for name, pair in changed.items()})
        for side, model in enumerate((base_model, tuned_model))
    ]
    moments = moments_of(sides, calibrated) if calibrated else None
    meant = model_logits(tuned_model, prompts)

    def write(deltas: Sequence[Delta], place: Path, told: str) -> None:
        counted = "outputs" if moments else "weights"
        method = f"extract of {tuned.resolve().name} in {dtype}, errors of {counted}, {told}"
        name = bench.runtime.base_names[0]
        write_terms_adapter(place, deltas, base.spec.fingerprint, base_name=name, method=method)

    return extract(
        found,
        folder,
        budget,
        dtype=getattr(torch, dtype),
        write=write,
        score=lambda place: divergence(meant, bench.logits(place, prompts)),
        base_divergence=divergence(meant, bench.logits(None, prompts)),
        moments=moments,
        num_calibration_tokens=sum(map(len, calibrated)),
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
    for heading in ("linears", "form", "size", f"{'/'.join(map(str, BITS))} bits", "bytes", "share", "error"):
        table.add_column(heading, justify="left" if heading in ("linears", "form", "size") else "right")
    for row in _by_sort(found):
        table.add_row(*row)
    console.print(table)
    counted = f"outputs on {found.num_calibration_tokens:,} tokens" if found.num_calibration_tokens else "the weights"
    console.print(f"squares, shares and errors (relative, root mean square) are of {counted}")
    if found.num_vectors:
        console.print(f"{found.num_vectors} biases and norms are taken whole")
    if found.not_carried:
        names = sorted(found.not_carried, key=lambda name: -found.not_carried[name])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        console.print(f"not carried, adapters cannot change them: {', '.join(names[:3])}{more}")


def _by_sort(found: Extraction) -> list[tuple[str, ...]]:
    """Rows of the table: linears that share the last part of their names, and of these the forms that they got."""
    sorts: dict[str, list[Any]] = {}
    for row in found.rows:
        sorts.setdefault(row.module.rpartition(".")[2], []).append(row)
    table: list[tuple[str, ...]] = []
    for name, rows in sorts.items():
        for place, form in enumerate(sorted({row.form for row in rows})):
            those = [row for row in rows if row.form == form]
            share = sum(row.share for row in those)
            error = (sum(row.share * row.output_error**2 for row in those) / share) ** 0.5
            many = f"{form}, {len(those)} of {len(rows)}" if len(those) < len(rows) else form
            numbers = f"{sum(row.num_bytes for row in those):,}", f"{share:.1%}", f"{error:.3f}"
            table.append((name if place == 0 else "", many, *_told_size(those), *numbers))
    return table


def _told_size(rows: list[Any]) -> tuple[str, str]:
    """Ranks or entries, and of mixed precision the mean number of directions for each number of bits."""
    form, sizes = rows[0].form, [row.size for row in rows]
    if form == "mixed precision":
        means = (sum(row.bits.get(bits, 0) for row in rows) / len(rows) for bits in BITS)
        return f"rank {_range(sizes)}", "/".join(f"{mean:.0f}" for mean in means)
    if form == "low rank":
        return f"rank {_range(sizes)}", ""
    return (_range(sizes) if form == "sparse" else "", "")


def _range(sizes: list[int]) -> str:
    return f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"


def _keep(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)
