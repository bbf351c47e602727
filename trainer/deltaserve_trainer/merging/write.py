"""An update as adapter files: the plainest of the project's own formats that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deltaserve_store.formats.deltaserve_sparse import write_sparse_adapter
from deltaserve_store.formats.deltaserve_terms import write_terms_adapter
from deltaserve_store.formats.deltaserve_vectors import write_vector_adapter
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltaserve_trainer.errors import MergeRefused
from deltaserve_trainer.merging.update import LinearUpdate, Update

MAX_METHOD = 1024
"""Characters of ``method`` that the formats take."""


def write_update(
    update: Update,
    folder: Path,
    base_fingerprint: str,
    *,
    base_name: str | None,
    method: str,
    chat_template: str | None = None,
    stop_token_ids: Sequence[int] = (),
) -> None:
    """``deltaserve-sparse`` or ``deltaserve-vectors`` where the update is that alone, else ``deltaserve-terms``.

    ``method`` is provenance and is cut where the format ends. Raises ``MergeRefused`` when nothing changes.
    """
    deltas = deltas_of(update)
    if not deltas:
        raise MergeRefused("nothing is left: the result does not change the base")
    options: dict[str, Any] = {
        "base_name": base_name,
        "method": method if len(method) <= MAX_METHOD else method[: MAX_METHOD - 3] + "...",
        "chat_template": chat_template,
        "stop_token_ids": tuple(stop_token_ids),
    }
    sparse = [delta for delta in deltas if isinstance(delta, SparseDelta)]
    vectors = [delta for delta in deltas if isinstance(delta, VectorDelta | NormDelta)]
    if len(sparse) == len(deltas):
        write_sparse_adapter(folder, sparse, base_fingerprint, **options)
    elif len(vectors) == len(deltas):
        write_vector_adapter(folder, vectors, base_fingerprint, **options)
    else:
        write_terms_adapter(folder, deltas, base_fingerprint, **options)


def deltas_of(update: Update) -> list[LoraDelta | SparseDelta | VectorDelta | NormDelta]:
    """The deltas of the files; parts that are zero throughout are left out."""
    deltas: list[LoraDelta | SparseDelta | VectorDelta | NormDelta] = []
    for name, change in update.linears.items():
        deltas += _linear_deltas(name, change)
    for name, parts in update.norms.items():
        kept: dict[str, Any] = {part: vector for part, vector in parts.items() if bool(vector.any())}
        if kept:
            deltas.append(NormDelta(name, **kept))
    return deltas


def _linear_deltas(name: str, change: LinearUpdate) -> list[LoraDelta | SparseDelta | VectorDelta]:
    deltas: list[LoraDelta | SparseDelta | VectorDelta] = []
    if change.factors is not None and bool(change.factors.a.any()) and bool(change.factors.b.any()):
        deltas.append(LoraDelta(name, change.factors.a, change.factors.b, 1.0))
    if change.entries is not None:
        kept = change.entries.values != 0
        keys, width = change.entries.keys[kept], change.shape[1]
        if len(keys):
            rows, cols = (keys // width).to(torch.int32), (keys % width).to(torch.int32)
            deltas.append(SparseDelta(name, rows, cols, change.entries.values[kept]))
    vectors: dict[str, Any] = {}
    for part, vector in change.vectors.items():
        if bool(vector.any()):
            vectors[part.replace("_gate", "_scale")] = vector if part == "bias" else 1 + vector
    if vectors:
        deltas.append(VectorDelta(name, **vectors))
    return deltas
