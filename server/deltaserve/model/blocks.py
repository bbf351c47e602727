"""Row and column blocks of a projection group, in steps that have some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from deltaserve_kernels import BlockTables, WorkList, block_linear

if TYPE_CHECKING:
    from deltaserve.model.linear import Member


def add_blocks(
    y: Tensor, rows: Tensor, work: WorkList, blocks: BlockTables, members: Sequence[Member], depth: float
) -> bool:
    """Add the blocks of ``members`` to ``y`` [T, N] in place; ``rows`` [T, K]. Whether tables have any of them."""
    if not work.concerns(blocks, members):
        return False
    block_linear(y, rows, work, blocks, members, depth)
    return True
