"""A work list of fixed capacity in one buffer: what a captured graph reads, step after step, at the same addresses.

Only numbers change from step to step: counts are where the starts of items stop rising. A graph's launches cover the
capacity, and programs past the counts leave at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaserve_kernels.errors import OutOfRange
from deltaserve_kernels.worklist import Parts, WorkList

SPARE_PARTS = 8
PLANES_PER_ROW = 8


@dataclass(frozen=True)
class PaddedLayout:
    """For steps of ``num_rows`` rows (T): T rows, T items and P = T + 8 parts, 6 T + 26 int32 in all.

    64 rows are 1,640 bytes. One adapter a row always fits; with more, ``fits`` tells.

    rows [T] | item_rows [T+1] | item_parts [T+1] | part_slot [P] | part_scale [P, 2], the bits of float32
    """

    num_rows: int

    @property
    def num_parts(self) -> int:
        return self.num_rows + SPARE_PARTS

    @property
    def num_planes(self) -> int:
        """Room for rows * parts: a row is shrunk once for each of its parts."""
        return PLANES_PER_ROW * self.num_rows

    @property
    def size(self) -> int:
        """int32 of the buffer."""
        return 3 * self.num_rows + 2 + 3 * self.num_parts

    def fits(self, bindings: Sequence[Parts]) -> bool:
        """Whether a step with these bindings, one a row, has room."""
        # Most steps have one part a row, or none.
        if len(bindings) <= self.num_rows and max(map(len, bindings), default=0) <= 1:
            return True
        num_parts = sum(map(len, set(bindings)))
        num_planes = sum(map(len, bindings))
        return len(bindings) <= self.num_rows and num_parts <= self.num_parts and num_planes <= self.num_planes

    def fill(self, out: Any, bindings: Sequence[Parts]) -> None:
        """Write the list of ``bindings`` (one a row, at most T) into ``out``, a numpy int32 [size].

        Items come in the order of their first row, as in ``build_work_list``. Raises OutOfRange without room.
        """
        if not self.fits(bindings):
            raise OutOfRange(f"a list of {self.num_rows} rows and {self.num_parts} parts has no room for the step")
        groups: dict[Parts, list[int]] = {}
        for row, parts in enumerate(bindings):
            if parts:
                groups.setdefault(parts, []).append(row)
        rows, item_rows, item_parts, part_slot, part_scale = self._split(out)
        out.fill(0)
        num_rows = num_parts = item = 0
        for parts, group in groups.items():
            rows[num_rows : num_rows + len(group)] = group
            part_slot[num_parts : num_parts + len(parts)] = [part[0] for part in parts]
            scales = np.array([part[1:] for part in parts], dtype=np.float32).reshape(-1)
            part_scale[2 * num_parts : 2 * (num_parts + len(parts))] = scales.view(np.int32)
            item, num_rows, num_parts = item + 1, num_rows + len(group), num_parts + len(parts)
            item_rows[item], item_parts[item] = num_rows, num_parts
        item_rows[item + 1 :], item_parts[item + 1 :] = num_rows, num_parts

    def work_list(self, buffer: Tensor) -> WorkList:
        """The list in ``buffer`` (int32 [size], on any device): a new object over the same memory.

        Make one for each pass: what operators derive from a list is kept with the object.
        """
        rows, item_rows, item_parts, part_slot, part_scale = self._split(buffer)
        scale = part_scale.view(torch.float32).view(self.num_parts, 2)
        return WorkList(
            self.num_rows, rows, item_rows, item_parts, part_slot, scale, num_planes=self.num_planes, is_padded=True
        )

    def _split(self, buffer: Any) -> tuple[Any, Any, Any, Any, Any]:
        t, p = self.num_rows, self.num_parts
        ends = (t, 2 * t + 1, 3 * t + 2, 3 * t + 2 + p, self.size)
        starts = (0, *ends[:-1])
        pieces = [buffer[start:end] for start, end in zip(starts, ends, strict=True)]
        return pieces[0], pieces[1], pieces[2], pieces[3], pieces[4]
