"""Dense blocks that an adapter's files hold: of a linear, and trained rows of the embedding or the head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowsDelta:
    """Rows of the embedding or the head, which stand in place of the base's: ``values`` [k, width] of the file's dtype.

    ``ids`` int32 [k], strictly ascending: the tokens they belong to; None: every token in turn. ``is_copy``: the file
    brings the base's own matrix along; it changes nothing, or the file is for another base.
    """

    module: str
    ids: Tensor | None
    values: Tensor
    is_copy: bool = False


@dataclass(frozen=True, slots=True)
class BlockDelta:
    """``W[out_rows[i], in_cols[j]] += values[i, j]`` for ``W`` of ``[out_features, in_features]``.

    ``values`` [o, c] of the file's dtype. Lists int32, strictly ascending; None means every row or every column, and at
    most one of them is None.
    """

    module: str
    out_rows: Tensor | None
    in_cols: Tensor | None
    values: Tensor
