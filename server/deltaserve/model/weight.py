"""A frozen weight matrix in the layout its device multiplies fastest.

On the CPU, oneDNN can reorder a weight once instead of at every product: 1.4 to 2.4 times faster at the sizes of a
decode step, and results that do not depend on how many rows are multiplied. The reordering is exact and can be undone.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

# The number of rows oneDNN plans for; other numbers work, and this plan is good from 1 to some hundreds.
_PLANNED_ROWS = 32


class BaseWeight:
    """[out, in] of one dtype. With ``keep`` the matrix itself stays too, because something else holds it anyway."""

    def __init__(self, weight: Tensor, *, keep: bool = False) -> None:
        self.shape = weight.shape
        self.dtype = weight.dtype
        self._packed = _prepack(weight)
        self._plain = weight.contiguous() if keep or self._packed is None else None

    def matmul(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """``rows`` [T, in] -> [T, out]."""
        if self._packed is None:
            return F.linear(rows, self.plain(), bias)
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, bias, "none", [], "")

    def plain(self) -> Tensor:
        """The matrix [out, in]; made anew at each call where only the reordered form is kept."""
        if self._plain is not None:
            return self._plain
        packed = self._packed
        if packed is None:
            raise RuntimeError("weight holds neither form")
        return packed.to_dense()


def _prepack(weight: Tensor) -> Tensor | None:
    """The reordered form, or None where oneDNN cannot multiply this dtype on this processor."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PLANNED_ROWS)
        torch.ops.mkldnn._linear_pointwise(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        logger.info("base weights in %s are multiplied as they are, without oneDNN: %s", weight.dtype, error)
        return None
    return packed
