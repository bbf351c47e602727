"""A frozen weight as terms read it that meet the base's numbers again: masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from deltaserve_kernels.errors import ShapeMismatch

PANEL = 16


class WeightView(NamedTuple):
    """The weight [N, K] of a projection group, all of its members one after another, in one of two forms.

    ``data``: [N, K], or the panels [ceil(N / 16), K, 16] that ``cpu.pack_weight`` makes of it. ``outputs``: N.
    """

    data: Tensor
    outputs: int

    @property
    def plain(self) -> Tensor:
        """[N, K]. Raises ``ShapeMismatch`` for panels, which only the CPU's operators read."""
        if self.data.dim() != 2:
            raise ShapeMismatch(f"the weight lies in panels {list(self.data.shape)}; a matrix is needed")
        return self.data

    def rows(self, i: int, j: int) -> Tensor:
        """fp32 [j - i, K]: rows i..j."""
        if self.data.dim() == 2:
            return self.data[i:j].float()
        first = i // PANEL
        panels = self.data[first : -(-j // PANEL)].transpose(1, 2).flatten(0, 1)
        return panels[i - first * PANEL : j - first * PANEL].float()


ReadWeight = Callable[[], WeightView]
"""Gives the view when it is asked for: to make one may cost a copy of the weight."""
