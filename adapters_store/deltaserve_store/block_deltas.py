"""Dense blocks that an adapter's files hold: trained rows of the embedding or the head."""

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
