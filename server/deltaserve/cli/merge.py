"""``deltaserve adapters merge``: several adapters into one that is served like any other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaserve.config import DEFAULT_STORE
from deltaserve.errors import InvalidRequest

if TYPE_CHECKING:
    from deltaserve.cli.workbench import Source, Workbench
    from deltaserve_store.parsed import ParsedAdapter
    from deltaserve_trainer.merging.options import MergeOptions
    from deltaserve_trainer.merging.update import Update

Opt = typer.Option


def merge(
    adapters: Annotated[list[str], typer.Argument(help="Names (name, name@version, alias) or adapter folders.")],
    out: Annotated[str, Opt(help="Name of the result; an existing name gets a new version.")],
    method: Annotated[
        str, Opt(help="linear, soup, greedy-soup, ties, dare, model-stock, lines, negmerge, ema.")
    ] = "linear",
    weights: Annotated[str | None, Opt(help="One number each, as 0.7,0.3; default: 1 each.")] = None,
    density: Annotated[float | None, Opt(help="ties, dare: share of numbers kept; 0.2.")] = None,
    seed: Annotated[int | None, Opt(help="dare: which numbers are dropped; 0.")] = None,
    scale: Annotated[float | None, Opt(help="negmerge: how strongly to forget; 1.")] = None,
    alpha: Annotated[float | None, Opt(help="lines: weight of the first layer; 0.")] = None,
    beta: Annotated[float | None, Opt(help="lines: what the last layer has more; 1.")] = None,
    momentum: Annotated[float | None, Opt(help="ema: share that the older ones keep; 0.9.")] = None,
    data: Annotated[Path | None, Opt(help="greedy-soup: held-out JSONL.")] = None,
    max_rows: Annotated[int, Opt(help="Rows of --data, at most.")] = 64,
    form: Annotated[str | None, Opt(help="ties, dare, negmerge: auto, lora or sparse.")] = None,
    rank: Annotated[int | None, Opt(help="Bound of the low-rank part; what is lost is told.")] = None,
    dtype: Annotated[str, Opt(help="Of stored matrices: float32, float16 or bfloat16.")] = "float32",
    accept_base: Annotated[bool, Opt("--accept-base", help="Folders that name another base.")] = False,
    keep: Annotated[Path | None, Opt(help="Folder to leave the result's files in, too.")] = None,
    server: Annotated[str | None, Opt(help="URL; default: whoever holds the store.")] = None,
    store: Annotated[Path, Opt(help="Folder of the adapters.")] = DEFAULT_STORE,
    model: Annotated[str | None, Opt(help="Base folder; default: the embedded base.")] = None,
    api_key: Annotated[str | None, Opt(envvar="DELTASERVE_API_KEY", help="The server's.")] = None,
    as_json: Annotated[bool, Opt("--json", help="Machine-readable output.")] = False,
) -> None:
    """Merge adapters into one, tell what was lost, and send the result through the door."""
    from deltaserve.cli.workbench import find_sources, workbench
    from deltaserve_store.names import validate_name
    from deltaserve_trainer.merging.options import MergeOptions

    validate_name(out)
    options = MergeOptions(
        method=method,
        weights=None if weights is None else _numbers(weights),
        density=density,
        seed=seed,
        scale=scale,
        alpha=alpha,
        beta=beta,
        momentum=momentum,
        data=None if data is None else str(data),
        form=form,
        rank=rank,
        dtype=dtype,
    )
    options.check_count(len(adapters))
    if keep is not None and keep.exists():
        raise InvalidRequest(f"--keep {keep}: it is there already; give a new folder.", param="keep")
    if max_rows < 1:
        raise InvalidRequest(f"--max-rows is {max_rows}; it must be at least 1.", param="max_rows")
    with tempfile.TemporaryDirectory(prefix="deltaserve-merge-") as place:
        scratch = Path(place)
        sources = find_sources(adapters, store, scratch)
        with workbench(store, model, server, api_key, scratch) as bench:
            outcome = merge_here(bench, sources, options, max_rows=max_rows, accept_base=accept_base)
            admitted = bench.admit(outcome.folder, out, source="merge")
        if keep is not None:
            import shutil

            shutil.copytree(outcome.folder, keep)
    if as_json:
        typer.echo(json.dumps({"adapter": admitted, **outcome.report}))
        return
    for line in outcome.lines():
        typer.echo(line)
    typer.echo(f"{out}: {'added' if admitted['created'] else 'already there'}, version {admitted['version'][:12]}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Files of a merge, not admitted yet, and what there is to say of it."""

    folder: Path
    report: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        report = self.report
        told = [f"{report['method']} of {', '.join(report['parents'])}"]
        if report["is_exact"]:
            told.append("exact: every number is what the method says, rounded once")
        else:
            told.append(
                f"lost: {report['lost']}; relative error at most {report['largest_error']:.3g} "
                f"({report['worst_module']}), {report['mean_error']:.3g} on average"
            )
        return [*told, *self.notes]


def merge_here(
    bench: Workbench, sources: Sequence[Source], options: MergeOptions, *, max_rows: int, accept_base: bool = False
) -> Outcome:
    """Read, merge, compress, write into the bench's scratch folder. Raises ``MergeRefused``, ``AdapterInvalid``."""
    import torch

    from deltaserve_trainer.merging.merge import compressed, merge
    from deltaserve_trainer.merging.options import ELEMENTWISE
    from deltaserve_trainer.merging.write import write_update

    spec = bench.runtime.base.spec
    parsed = [bench.read(source, accept_base=accept_base) for source in sources]
    updates = [bench.update(source, adapter) for source, adapter in zip(sources, parsed, strict=True)]
    facts: dict[str, Any] = {}
    notes: list[str] = []
    if options.method == "greedy-soup":
        update = _greedy(bench, sources, updates, options, max_rows, facts, notes)
        errors: dict[str, float] = {}
    else:
        merged = merge(updates, options, spec, bench.weights)
        update, errors = merged.update, dict(merged.errors)
        if merged.ratios:
            facts["ratios"] = dict(merged.ratios)
            least, most = min(merged.ratios.values()), max(merged.ratios.values())
            notes.append(f"share of the mean that is kept: {least:.3f} to {most:.3f}, by layer")
    is_low_rank_fit = bool(errors)
    update, further = compressed(update, options.rank, getattr(torch, options.dtype))
    for module, error in further.items():  # two steps lose at most the sum of what each loses
        errors[module] = errors.get(module, 0.0) + error
    is_exact = max(errors.values(), default=0.0) < 1e-6
    worst = max(errors, key=errors.__getitem__, default=None)
    parents = [
        source.told if options.weights is None else f"{weight:g}*{source.told}"
        for source, weight in zip(sources, options.weights_for(len(sources)), strict=True)
    ]
    report = {
        "method": options.told(),
        "parents": parents,
        "is_exact": is_exact,
        "lost": None if is_exact else _lost(options, is_low_rank_fit),
        "largest_error": max(errors.values(), default=0.0),
        "mean_error": sum(errors.values()) / len(errors) if errors else 0.0,
        "worst_module": worst,
        **facts,
    }
    is_low_rank = any(change.factors is not None for change in update.linears.values())
    if options.method in ELEMENTWISE and is_exact and not is_low_rank:
        notes.append("the result is stored as sparse entries, number by number")
    told = f"exact; {report['method']}" if is_exact else f"error {report['largest_error']:.3g}; {report['method']}"
    folder = bench.scratch / "merged"
    write_update(
        update,
        folder,
        spec.fingerprint,
        base_name=bench.runtime.base_names[0],
        method=f"merge, {told} of {', '.join(facts.get('chosen', parents))}",
        **_shared_manners(parsed, notes),
    )
    return Outcome(folder, report, tuple(notes))


def _greedy(
    bench: Workbench,
    sources: Sequence[Source],
    updates: Sequence[Update],
    options: MergeOptions,
    max_rows: int,
    facts: dict[str, Any],
    notes: list[str],
) -> Update:
    from deltaserve_trainer.merging.soup import greedy_soup
    from deltaserve_trainer.merging.write import write_update
    from deltaserve_trainer.scoring import read_rows

    base = bench.runtime.base
    rows = read_rows(
        Path(options.data or ""),
        bench.runtime.base.folder,
        max_rows=max_rows,
        max_length=bench.max_row_tokens,
    )

    def score(update: Update) -> float:
        with tempfile.TemporaryDirectory(dir=bench.scratch) as place:
            write_update(update, Path(place), base.spec.fingerprint, base_name=None, method="candidate")
            return bench.loss(Path(place), rows)

    soup = greedy_soup(updates, score)
    facts |= {"losses": list(soup.losses), "chosen": [sources[i].told for i in soup.chosen], "loss": soup.loss}
    notes += [
        f"{sources[i].told}: held-out loss {soup.losses[i]:.4f}{', in the soup' if i in soup.chosen else ''}"
        for i in soup.order
    ]
    notes.append(f"the soup: held-out loss {soup.loss:.4f} over {len(rows)} rows, by the engine")
    return soup.update


def _lost(options: MergeOptions, is_low_rank_fit: bool) -> str:
    parts = []
    if is_low_rank_fit:
        parts.append("the nearest low-rank matrices stand for full ones")
    if options.rank is not None and not is_low_rank_fit:
        parts.append(f"the sum was cut to rank {options.rank}")
    if options.dtype != "float32":
        parts.append(f"matrices were rounded to {options.dtype}")
    return ", ".join(parts) or "rounding"


def _shared_manners(parsed: Sequence[ParsedAdapter], notes: list[str]) -> dict[str, Any]:
    """Chat template and stop tokens, where all parents agree."""
    manners: dict[str, Any] = {}
    for field_name, neutral in (("chat_template", None), ("stop_token_ids", ())):
        found = {getattr(adapter, field_name) for adapter in parsed}
        if len(found) == 1:
            manners[field_name] = found.pop()
        else:
            notes.append(f"the parents differ in {field_name}; the result has none")
            manners[field_name] = neutral
    return manners


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequest(f"--weights {text!r}: write numbers as 0.7,0.3.", param="weights") from None
