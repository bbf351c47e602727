"""A frozen weight matrix in the layout its device multiplies fastest.

On the CPU a weight is reordered once instead of at every product. oneDNN does it where it has a path for the dtype
(fp32 everywhere, bf16 with AVX-512): 1.4 to 2.4 times faster at the sizes of a decode step. Elsewhere PyTorch
multiplies 16-bit matrices some fifty times slower than fp32 ones, so the C++ operators have a product of their own for
them. Both orders are exact, can be undone, and give results that do not depend on how many rows are multiplied.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaserve_kernels import PANEL, LoraTables, WeightView, WorkList, cpu, lora_linear, select
from deltaserve_kernels.checks import Member

logger = logging.getLogger(__name__)

# The number of rows oneDNN plans for; other numbers work, and this plan is good from 1 to some hundreds.
_PLANNED_ROWS = 32


class _Packed(Protocol):
    """A reordered weight [out, in]."""

    def matmul(self, rows: Tensor, bias: Tensor | None) -> Tensor: ...

    def to_plain(self) -> Tensor: ...


class OnednnPacked:
    """Raises RuntimeError, AttributeError or NotImplementedError where oneDNN has no path for the dtype."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PLANNED_ROWS)
        self.matmul(weight.new_zeros(1, weight.shape[1]), None)

    def matmul(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self._packed, bias, "none", [], "")

    def to_plain(self) -> Tensor:
        return self._packed.to_dense()


class PanelPacked:
    """Panels of the C++ operators, bf16 and fp16: ``panels`` of that many ``outputs``. Needs ``cpu.is_available()``."""

    def __init__(self, weight: Tensor) -> None:
        self.outputs = weight.shape[0]
        self.panels = cpu.pack_weight(weight)
        self._columns: dict[tuple[Member, ...], list[int]] = {}

    def matmul(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        return cpu.packed_linear(rows, self.panels, self.outputs, bias)

    def matmul_lora(
        self,
        rows: Tensor,
        bias: Tensor | None,
        work: WorkList,
        tables: LoraTables,
        members: tuple[Member, ...],
        depth: float,
    ) -> Tensor:
        columns = self._columns.get(members)
        if columns is None:
            columns = self._columns[members] = list(chain.from_iterable(members))
        return cpu.packed_linear_lora(rows, self.panels, self.outputs, bias, work, tables, columns, depth)

    def to_plain(self) -> Tensor:
        return cpu.unpack_weight(self.panels, self.outputs)


class BaseWeight:
    """[out, in] of one dtype. With ``keep`` the matrix itself stays too, because something else holds it anyway."""

    def __init__(self, weight: Tensor, *, keep: bool = False) -> None:
        self.shape = weight.shape
        self.dtype = weight.dtype
        self._packed = _prepack(weight)
        self._plain = weight.contiguous() if keep or self._packed is None else None

    def matmul(self, rows: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """``rows`` [T, in] -> [T, out]. With ``residual`` [T, out]: the product is added to it in place, and it is
        returned; the library's product does that itself, with one rounding, where neither bias nor order is in the way.
        """
        if residual is not None:
            if self._packed is None and bias is None:
                return residual.addmm_(rows, self.plain().t())
            return residual.add_(self.matmul(rows, bias))
        if self._packed is None:
            return F.linear(rows, self.plain(), bias)
        return self._packed.matmul(rows, bias)

    def matmul_lora(
        self,
        rows: Tensor,
        bias: Tensor | None,
        work: WorkList,
        tables: LoraTables,
        members: tuple[Member, ...],
        depth: float,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``matmul`` and ``lora_linear`` on its result, in one call where there is one."""
        if isinstance(self._packed, PanelPacked):
            y = self._packed.matmul_lora(rows, bias, work, tables, members, depth)
            return y if residual is None else residual.add_(y)
        y = self.matmul(rows, bias, residual)
        lora_linear(y, rows, work, tables, members, depth)
        return y

    def joins_vectors(self, members: Sequence[Member]) -> PanelPacked | None:
        """The form whose product takes scales and biases of these members into its sums, if it is that one. Goes by the
        base alone, never by a step."""
        if isinstance(self._packed, PanelPacked) and all(m[1] % PANEL == 0 == (m[2] - m[1]) % PANEL for m in members):
            return self._packed
        return None

    def matmul_both(
        self,
        rows: Tensor,
        bias: Tensor | None,
        work: WorkList,
        tables: LoraTables | None,
        members: tuple[Member, ...],
        depth: float,
        residual: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """``matmul``, or ``matmul_lora`` with ``tables``, without and with ``residual``, the same bits; the product is
        computed twice only where the library's own adds and rounds at once."""
        if tables is not None and isinstance(self._packed, PanelPacked):
            y = self._packed.matmul_lora(rows, bias, work, tables, members, depth)
            return y, residual.add_(y)
        y = self.matmul(rows, bias)
        rounds_once = self._packed is None and bias is None
        total = self.matmul(rows, bias, residual) if rounds_once else residual.add_(y)
        if tables is not None:
            lora_linear(y, rows, work, tables, members, depth)
            lora_linear(total, rows, work, tables, members, depth)
        return y, total

    def view(self) -> WeightView:
        """What terms read that meet the base's numbers in a step: panels as they lie, else ``plain``."""
        if self._plain is None and isinstance(self._packed, PanelPacked):
            return WeightView(self._packed.panels, self.shape[0])
        return WeightView(self.plain(), self.shape[0])

    def plain(self) -> Tensor:
        """The matrix [out, in]; made anew at each call where only the reordered form is kept."""
        if self._plain is not None:
            return self._plain
        packed = self._packed
        if packed is None:
            raise RuntimeError("weight holds neither form")
        return packed.to_plain()


def _prepack(weight: Tensor) -> _Packed | None:
    """The reordered form, or None where nothing here multiplies this dtype faster than PyTorch does."""
    if weight.device.type != "cpu":
        return None
    if torch.backends.mkldnn.is_available():
        try:
            return OnednnPacked(weight)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            logger.debug("oneDNN does not reorder weights in %s here: %s", weight.dtype, error)
    if weight.dtype in (torch.bfloat16, torch.float16) and select(weight.device) == "cpu":
        return PanelPacked(weight)
    logger.info("base weights in %s are multiplied as they are", weight.dtype)
    return None
