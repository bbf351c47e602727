"""The page docs/parity.md: measured rows as a table, and what the columns mean."""

from __future__ import annotations

import platform
from collections.abc import Iterable

import torch

from deltatest.parity.ensembles import NUM_ANSWERED, Case, EnsembleRow
from deltatest.parity.measure import NUM_STREAMS, NUM_TOKENS, Row
from deltatest.parity.registry import NOT_MEASURED, TOLERANCE, Entry

HEAD = (
    "kind",
    "file",
    "written by",
    "judge",
    "effect",
    "alone",
    "in company",
    "strength 0",
    "evicted, reloaded",
    "bytes",
    "decode step",
)
ENSEMBLE_HEAD = (
    "ensemble",
    "mix of",
    "members",
    "effect",
    "likeliest tokens",
    "alone",
    "in company",
    "evicted, reloaded",
)
COMMAND = "PYTHONPATH=tests python -m deltatest.parity --write docs/parity.md --timed"

_INTRO = f"""# Parity

Made by `{COMMAND}`; edit `tests/deltatest/parity`, not this page.

Each row is an adapter of a kind that [adapter-kinds.md](adapter-kinds.md) calls served, with random values in every
trained tensor. Its files went through the door of a real runtime (store, proof, engine thread, scheduler, pages) and
are served from there. Differences are the largest of any logit over {NUM_TOKENS} tokens and the whole vocabulary, in
float32:

- **judge**: what the server is compared with. *PEFT*: PEFT's own unmerged model, loaded from the same files. *Edited
  weights*: transformers' model with the file's numbers put into its weights (formats that only deltaserve has).
  *Hooked modules*: that model with modules hung around its sublayers.
- **effect**: judge against base, so that a difference of 0 would not come from doing nothing.
- **alone**: server against judge, the sequence by itself. **In company**: the same sequence in one step with a
  sequence of every other row of this table and one of the base, and whether its bits are those it has alone. Both
  differences must be below {TOLERANCE:g} of the root mean square of the logits (at least of 1).
- **strength 0**: whether the base's bits come out. **Evicted, reloaded**: whether the same bits come out after the
  adapter left both memory tiers and was loaded again.
- **bytes**: what the adapter takes on the device. **Decode step**: a step of {NUM_STREAMS} sequences, all with this
  adapter, against one of the base. The base is tiny, so this is the cost of Python and of calls, not of arithmetic;
  what adapters cost a base of some size is in [benchmarks.md](benchmarks.md).

Everything here is exact. Where a delta of a rank above 1024 is served by its best term, the error is stated at its
upload ([adapter-kinds.md](adapter-kinds.md#deltas-of-high-rank)).
"""
_OF_ENSEMBLES = f"""
## Several models as one

[Ensembles](api.md#several-models-as-one) of adapters of the table above, through requests: greedy answers of
{NUM_ANSWERED} tokens, each drawn from the mix of all members. The judge is offline: what the members' own judges say of
the same tokens, one member by itself after the other, mixed in float64 by the members' weights. Differences are the
largest of any log probability before any token of the answer.

- **likeliest tokens**: how many tokens of the answer are the offline mix's likeliest, after the tokens before them. All
  of them: it is the answer that members give who are computed one by one in lock-step.
- **in company**: beside all other ensembles, a sequence of every adapter above and one of the base, in the same steps.
- **evicted, reloaded**: after every member's adapter left both memory tiers and was loaded again.
"""


def parity_page(rows: Iterable[Row], ensembles: Iterable[EnsembleRow] = ()) -> str:
    """The whole page."""
    rows = list(rows)
    lines = [_INTRO, _setting(), "", f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    if NOT_MEASURED:
        lines += ["", "Served, but not in this table:", ""]
        lines += [f"- {kind}: {why}" for kind, why in sorted(NOT_MEASURED.items())]
    lines += [_OF_ENSEMBLES, f"| {' | '.join(ENSEMBLE_HEAD)} |", f"|{' --- |' * len(ENSEMBLE_HEAD)}"]
    lines += [f"| {' | '.join(_cells_of_ensemble(row))} |" for row in ensembles]
    return "\n".join(lines) + "\n"


def names_of(entry: Entry) -> tuple[str, str, str, str]:
    """The cells that come from the entry, not from measuring."""
    return entry.kind, entry.variant, entry.writer, entry.judge


def names_of_ensemble(case: Case) -> tuple[str, str, str]:
    return case.name, case.mix.value, case.told


def read_page(text: str, head: tuple[str, ...] = HEAD) -> list[tuple[str, ...]]:
    """The cells of the rows of the table with this ``head``."""
    lines = text.splitlines()
    start = lines.index(f"| {' | '.join(head)} |") + 2
    rows: list[tuple[str, ...]] = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
    return rows


def _setting() -> str:
    from importlib.metadata import version

    return (
        f"Measured on {platform.machine()}, on the CPU, with PyTorch {torch.__version__}, transformers "
        f"{version('transformers')} and PEFT {version('peft')}: a Llama of 2 layers and width 64, with biases in "
        "attention."
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        *names_of(row.entry),
        f"{row.effect:.2f}",
        f"{row.alone:.1e}",
        f"{row.mixed:.1e}, {'same bits' if row.company_bits else 'OTHER BITS'}",
        "has none" if row.zero_bits is None else "base's bits" if row.zero_bits else "OTHER BITS",
        "same bits" if row.reload_bits else "OTHER BITS",
        f"{row.nbytes:,}",
        "" if row.slowdown is None else f"{row.slowdown:+.0%}",
    )


def _cells_of_ensemble(row: EnsembleRow) -> tuple[str, ...]:
    return (
        *names_of_ensemble(row.case),
        f"{row.effect:.2f}",
        f"{row.likeliest} of {NUM_ANSWERED}",
        f"{row.alone:.1e}",
        f"{row.mixed:.1e}, {'same bits' if row.company_bits else 'OTHER BITS'}",
        "same bits" if row.reload_bits else "OTHER BITS",
    )
