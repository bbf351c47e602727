"""An adapter that passed every check: its tensors and the few facts that serving needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from deltaserve_store.vector_deltas import NormDelta, VectorDelta

Kind = Literal["lora", "sparse", "vector"]
FileFormat = Literal["peft-lora", "peft-shira", "deltaserve-sparse", "peft-ia3", "peft-ln-tuning", "deltaserve-vectors"]


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """``W + scaling * b @ a`` with ``a [r, in_features]`` and ``b [out_features, r]``, in the dtype of the file.

    The orientation is that of ``W [out, in]`` also where the base stores its weight transposed. ``magnitude [out]``:
    the rows of the sum are brought to these norms (DoRA); the base's bias is not.
    """

    module: str
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """``W[rows[i], cols[i]] += values[i]``: ``rows`` and ``cols`` int32 ``[k]``, ``values [k]`` in the file's dtype.

    Positions are unique and sorted by row, then column, in the ``[out, in]`` orientation.
    """

    module: str
    rows: Tensor
    cols: Tensor
    values: Tensor

    @property
    def num_entries(self) -> int:
        return int(self.values.shape[0])


@dataclass(frozen=True, slots=True)
class ParsedAdapter:
    """Every tensor of the files is in ``deltas``, every field of the config is in ``config`` and understood.

    ``rank`` is the largest one (None for sparse adapters). ``base_name`` is what a PEFT config says,
    ``base_fingerprint`` what our own files carry. ``chat_template`` names a template of the operator's registry;
    template text is never taken from an adapter. ``skipped`` lists files that are no part of the adapter.
    """

    kind: Kind
    file_format: FileFormat
    deltas: tuple[LoraDelta | SparseDelta | VectorDelta | NormDelta, ...]
    config: Mapping[str, Any]
    base_name: str | None
    base_fingerprint: str | None
    rank: int | None
    num_parameters: int
    chat_template: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    skipped: tuple[str, ...] = field(default=())
