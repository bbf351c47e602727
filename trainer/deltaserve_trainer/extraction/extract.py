"""A fine-tune becomes an adapter: plan, write, score, for a few budgets and the one that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.formats.deltaserve_dense import MAX_DENSE_WEIGHTS
from deltaserve_store.packed_factors import PackedFactors
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltaserve_trainer.errors import ExtractRefused
from deltaserve_trainer.extraction.activations import Measure, Moments
from deltaserve_trainer.extraction.difference import Difference
from deltaserve_trainer.extraction.pieces import Piece, dense_of, pieces_of
from deltaserve_trainer.extraction.plan import FORMS, Form, Plan, Worth, best_plan
from deltaserve_trainer.extraction.worth import INDEX_BYTES, Costs, worth_of

ALL = "all forms"
FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
FRACTIONS_ALONE = (1 / 16, 1 / 4, 1.0)
CONFIG_BYTES = 1200
"""Of ``adapter.json`` without its modules, and of both headers, at most."""
ENTRY_BYTES = 80
"""Of a tensor in a header, or a module in ``adapter.json``, without its name, at most."""

Delta = Piece | VectorDelta | NormDelta
Write = Callable[[Sequence[Delta], Path, str], None]
Score = Callable[[Path], float]


@dataclass(frozen=True, slots=True)
class Point:
    """One adapter of the curve. ``kept``: share of the linears' squared difference, as it is measured, that it holds.
    ``divergence``: mean KL(fine-tune || base with the adapter) per position, nats."""

    forms: str
    budget: int
    num_bytes: int
    kept: float
    divergence: float


@dataclass(frozen=True, slots=True)
class Row:
    """What one linear got. ``size``: rank, entries, or 1. ``bits``: directions by bits. ``share`` of all squares as
    measured. ``error`` of the weights, ``output_error`` as measured: relative, root mean square; 1 without a form."""

    module: str
    form: str
    size: int
    bits: Mapping[int, int]
    num_bytes: int
    share: float
    error: float
    output_error: float


@dataclass(frozen=True, slots=True)
class Extraction:
    """``folder`` holds the adapter of the whole budget. ``base_divergence``: the same KL of the bare base."""

    folder: Path
    points: tuple[Point, ...]
    rows: tuple[Row, ...]
    base_divergence: float
    num_vectors: int
    not_carried: Mapping[str, float]
    num_calibration_tokens: int

    @property
    def final(self) -> Point:
        return next(point for point in reversed(self.points) if point.forms == ALL)

    def to_json(self) -> dict[str, Any]:
        return {
            "points": [asdict(point) for point in self.points],
            "rows": [asdict(row) for row in self.rows],
            "base_divergence": self.base_divergence,
            "num_vectors": self.num_vectors,
            "not_carried": dict(self.not_carried),
            "num_calibration_tokens": self.num_calibration_tokens,
        }


def extract(
    found: Difference,
    folder: Path,
    budget: int,
    *,
    dtype: torch.dtype,
    write: Write,
    score: Score,
    base_divergence: float,
    moments: Mapping[str, Moments] | None = None,
    num_calibration_tokens: int = 0,
) -> Extraction:
    """Make the adapter of at most ``budget`` bytes in ``folder / "adapter"``, and smaller ones beside it.

    ``write(deltas, folder, method)`` writes files; ``score(folder)`` is the divergence with the adapter there. Errors
    count by what they do to the linears' outputs where ``moments`` tell of their inputs, else each number alike. Biases
    and norms are taken whole, in float32, before anything else. Raises ``ExtractRefused`` for a budget that is too
    small for them and for the first singular vector or entry.
    """

    def measure(name: str) -> Measure:
        if moments is None or name not in moments:
            return Measure.plain(found.matrix(name).shape[1])
        return moments[name].measure()

    costs = Costs(dtype, ENTRY_BYTES)
    fits = budget <= MAX_DENSE_WEIGHTS * costs.number_bytes  # more whole matrices than the door takes
    forms = [form for form in FORMS if fits or form != "dense"]
    worths = {name: worth_of(name, found.matrix(name), measure(name), costs, forms=forms) for name in found.changed()}
    fixed = _vector_bytes(found)
    longest = max(map(len, worths), default=0)
    least = fixed + 4 * (longest + ENTRY_BYTES) + INDEX_BYTES + costs.number_bytes if worths else fixed
    if budget < least:
        raise ExtractRefused(f"a budget of {budget:,} bytes holds nothing of this fine-tune; the least is {least:,}")
    wanted: list[tuple[Sequence[Form], int]] = [(forms, int(budget * share)) for share in FRACTIONS]
    wanted += [([form], int(budget * share)) for form in forms for share in FRACTIONS_ALONE if worths]
    planned = [(some, size, best_plan(worths, size - fixed, forms=some)) for some, size in wanted if size >= least]
    # A form that is too large for the budget has no point; vectors alone are no form.
    planned = [(some, size, chosen) for some, size, chosen in planned if some is forms or chosen.choices]
    pieces = pieces_of([chosen for *_, chosen in planned], found.matrix, measure, dtype)
    total = sum(part.total for part in worths.values())
    points = []
    final, linears = Plan({}, 0, 0.0), {}
    for (some, size, chosen), made in zip(planned, pieces, strict=True):
        told = ALL if some is forms else some[0]
        is_result = some is forms and size == budget
        place = folder / ("adapter" if is_result else f"{told.replace(' ', '-')}-{size}")
        kept = chosen.kept / total if total else 1.0
        write([*made.values(), *_vectors(found)], place, f"{told}, {kept:.4f} of the squares kept")
        num_bytes = sum(file.stat().st_size for file in place.iterdir())
        if num_bytes > size:
            raise ExtractRefused(f"the files have {num_bytes:,} bytes, the budget is {size:,}; give a larger one")
        points.append(Point(told, size, num_bytes, kept, score(place)))
        if is_result:
            final, linears = chosen, made
    return Extraction(
        folder / "adapter",
        tuple(points),
        _rows(final, worths, linears, found.matrix, measure),
        base_divergence,
        len(found.biases) + sum(len(parts) for parts in found.norms.values()),
        found.not_carried,
        num_calibration_tokens,
    )


def _vectors(found: Difference) -> list[VectorDelta | NormDelta]:
    biases = [VectorDelta(name, bias=bias) for name, bias in found.biases.items()]
    norms = [NormDelta(name, parts.get("gain"), parts.get("shift")) for name, parts in found.norms.items()]
    return [*biases, *norms]


def _vector_bytes(found: Difference) -> int:
    """Vectors with their names, and what every adapter has."""
    vectors: list[tuple[str, Tensor]] = list(found.biases.items())
    vectors += [(name, vector) for name, parts in found.norms.items() for vector in parts.values()]
    return CONFIG_BYTES + sum(4 * vector.numel() + 2 * (len(name) + ENTRY_BYTES) for name, vector in vectors)


def _rows(
    chosen: Plan,
    worths: Mapping[str, Worth],
    pieces: Mapping[str, Piece],
    matrix: Callable[[str], Tensor],
    measure: Callable[[str], Measure],
) -> tuple[Row, ...]:
    total = sum(part.total for part in worths.values())
    rows = []
    for name, part in worths.items():
        share = part.total / total if total else 0.0
        choice = chosen.choices.get(name)
        if choice is None:
            rows.append(Row(name, "nothing", 0, {}, 0, share, 1.0, 1.0))
            continue
        piece, delta = pieces[name], matrix(name)
        left = delta - dense_of(piece, part.shape)
        error = float(torch.linalg.matrix_norm(left.double()) / torch.linalg.matrix_norm(delta.double()))
        output_error = (measure(name).squares(left) / part.total) ** 0.5
        bits = dict(piece.ranks) if isinstance(piece, PackedFactors) else {}
        size = choice.rank if choice.form != "sparse" else choice.size
        rows.append(Row(name, choice.form, size, bits, choice.num_bytes, share, error, output_error))
    return tuple(rows)
