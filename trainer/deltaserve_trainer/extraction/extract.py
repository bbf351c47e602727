"""A fine-tune becomes an adapter: plan, write, score, for a few budgets and the one that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaserve_trainer.errors import ExtractRefused
from deltaserve_trainer.extraction.difference import Difference
from deltaserve_trainer.extraction.pieces import Pieces
from deltaserve_trainer.extraction.plan import (
    FORMS,
    INDEX_BYTES,
    Form,
    Plan,
    Spectrum,
    best_plan,
    plan,
    spectrum,
)
from deltaserve_trainer.merging.update import LinearUpdate, Update

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
CONFIG_BYTES = 1200
"""Of ``adapter.json`` without its modules, and of both headers, at most."""
ENTRY_BYTES = 80
"""Of a tensor in a header, or a module in ``adapter.json``, without its name, at most."""

Write = Callable[[Update, Path, str], None]
Score = Callable[[Path], float]


@dataclass(frozen=True, slots=True)
class Point:
    """One adapter of the curve. ``kept``: share of the squared difference of the linears that it holds. ``divergence``:
    mean KL(fine-tune || base with the adapter) per position, nats."""

    forms: str
    budget: int
    num_bytes: int
    kept: float
    divergence: float


@dataclass(frozen=True, slots=True)
class Row:
    """What one linear got. ``error``: relative, Frobenius; 1 where nothing of it is held."""

    module: str
    form: str
    size: int
    num_bytes: int
    share: float
    error: float


@dataclass(frozen=True, slots=True)
class Extraction:
    """``folder`` holds the adapter of the whole budget. ``base_divergence``: the same KL of the bare base."""

    folder: Path
    points: tuple[Point, ...]
    rows: tuple[Row, ...]
    base_divergence: float
    num_vectors: int
    not_carried: Mapping[str, float]

    @property
    def final(self) -> Point:
        return next(point for point in reversed(self.points) if point.forms == "mixed")

    def to_json(self) -> dict[str, Any]:
        return {
            "points": [asdict(point) for point in self.points],
            "rows": [asdict(row) for row in self.rows],
            "base_divergence": self.base_divergence,
            "num_vectors": self.num_vectors,
            "not_carried": dict(self.not_carried),
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
) -> Extraction:
    """Make the adapter of at most ``budget`` bytes in ``folder / "adapter"``, and smaller ones beside it.

    ``write(update, folder, method)`` writes files; ``score(folder)`` is the divergence with the adapter there. Biases
    and norms are taken whole, in float32, before anything else. Raises ``ExtractRefused`` for a budget that is too
    small for them and for the first singular vector or entry.
    """
    number_bytes = torch.empty(0, dtype=dtype).element_size()
    spectra = {name: spectrum(found.matrix(name)) for name in found.changed()}
    fixed = _vector_bytes(found)
    longest = max(map(len, spectra), default=0)
    least = fixed + 4 * (longest + ENTRY_BYTES) + INDEX_BYTES + number_bytes if spectra else fixed
    if budget < least:
        raise ExtractRefused(f"a budget of {budget:,} bytes holds nothing of this fine-tune; the least is {least:,}")
    wanted = [("mixed", int(budget * fraction)) for fraction in FRACTIONS] + [(form, budget) for form in FORMS]
    wanted = [(forms, size) for forms, size in wanted if size >= least and (spectra or forms == "mixed")]
    plans = [_plan(forms, size - fixed, spectra, number_bytes) for forms, size in wanted]
    pieces = Pieces(plans, found.matrix, dtype)
    total = sum(part.total for part in spectra.values())
    points = []
    for (forms, size), chosen in zip(wanted, plans, strict=True):
        is_result = forms == "mixed" and size == budget
        place = folder / ("adapter" if is_result else f"{forms.replace(' ', '-')}-{size}")
        kept = chosen.kept / total if total else 1.0
        write(pieces.update(chosen, found.biases, found.norms), place, f"{forms}, {kept:.4f} of the squares kept")
        num_bytes = sum(file.stat().st_size for file in place.iterdir())
        if num_bytes > size:
            raise ExtractRefused(f"the files have {num_bytes:,} bytes, the budget is {size:,}; give a larger one")
        points.append(Point(forms, size, num_bytes, kept, score(place)))
    final = plans[wanted.index(("mixed", budget))]
    return Extraction(
        folder / "adapter",
        tuple(points),
        _rows(final, spectra, pieces.update(final, {}, {}).linears, found.matrix, number_bytes),
        base_divergence,
        len(found.biases) + sum(len(parts) for parts in found.norms.values()),
        found.not_carried,
    )


def _plan(forms: str, budget: int, spectra: Mapping[str, Spectrum], number_bytes: int) -> Plan:
    if not spectra:
        return Plan({}, 0, 0.0)
    if forms == "mixed":
        return best_plan(spectra, budget, number_bytes=number_bytes, entry_bytes=ENTRY_BYTES)
    only: Sequence[Form] = [form for form in FORMS if form == forms]
    return plan(spectra, budget, number_bytes=number_bytes, entry_bytes=ENTRY_BYTES, forms=only)


def _vector_bytes(found: Difference) -> int:
    """Vectors with their names, and what every adapter has."""
    vectors: list[tuple[str, Tensor]] = list(found.biases.items())
    vectors += [(name, vector) for name, parts in found.norms.items() for vector in parts.values()]
    return CONFIG_BYTES + sum(4 * vector.numel() + 2 * (len(name) + ENTRY_BYTES) for name, vector in vectors)


def _rows(
    chosen: Plan,
    spectra: Mapping[str, Spectrum],
    changes: Mapping[str, LinearUpdate],
    matrix: Callable[[str], Tensor],
    number_bytes: int,
) -> tuple[Row, ...]:
    total = sum(part.total for part in spectra.values())
    rows = []
    for name, part in spectra.items():
        share = part.total / total
        choice = chosen.choices.get(name)
        if choice is None:
            rows.append(Row(name, "nothing", 0, 0, share, 1.0))
            continue
        item = sum(part.shape) * number_bytes if choice.form == "low rank" else INDEX_BYTES + number_bytes
        left = matrix(name) - changes[name].dense(lambda: torch.empty(0))
        error = float(torch.linalg.matrix_norm(left.double())) / part.total**0.5
        rows.append(Row(name, choice.form, choice.size, choice.size * item, share, error))
    return tuple(rows)
