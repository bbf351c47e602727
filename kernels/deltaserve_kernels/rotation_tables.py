"""Tables of rotations: per linear and slot the factors that turn a row of its input, or of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.errors import OutOfRange, ShapeMismatch
from deltaserve_kernels.pointer_tables import FLOAT_DTYPES, PointerTables


class RotationFactor(NamedTuple):
    """A row is taken in the order ``order`` (int32 [n], a permutation; None: as it is) and cut into blocks of b; block
    z becomes ``z + z @ blocks[k]`` and goes back to its places.

    ``blocks`` [n / b, b, b], or [1, b, b] that all blocks share: the rotation less the identity.
    """

    blocks: Tensor
    order: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.blocks,) if self.order is None else (self.order, self.blocks)

    @property
    def width(self) -> int:
        """n; 0 where one block is shared and says nothing of it."""
        if self.order is not None:
            return self.order.numel()
        return 0 if self.blocks.shape[0] == 1 else self.blocks.shape[0] * self.blocks.shape[1]


RotationEntry = tuple[RotationFactor, ...]
"""The factors of one rotation, the one that meets a row first in front."""


class RotationTables(PointerTables):
    """``factors`` answers those of an entry.

    pointers: int64 [num_linears, num_slots]  addresses of what kernels read of an entry (``_tell``), on the same device
    """

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_linears, num_slots, device)
        self.pointers = self._array()
        self._most: dict[int, int] = {}
        self._factors: dict[tuple[int, int], RotationEntry] = {}
        # By linear: (size of a block, width or 0) of the factors that it has, or once had.
        self._cuts: list[set[tuple[int, int]]] = [set() for _ in range(num_linears)]

    def factors(self, linear: int, slot: int) -> RotationEntry | None:
        """The factors of an entry, or None."""
        return self._factors.get((linear, slot))

    def num_factors(self, slot: int) -> int:
        """The most factors that an entry of the slot has had, 0 where it is empty."""
        return self._most.get(slot, 0)

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self._most.pop(slot, None)

    def set_all(self, slot: int, entries: Sequence[tuple[int, RotationEntry]]) -> None:
        """Point a slot at the rotations of a whole adapter, replacing what was there for these linears.

        Blocks are of one float dtype throughout the table, all contiguous and 16-byte aligned; the caller must not
        change them while the entry stands, and vouches for each ``order`` being a permutation. Raises a KernelError and
        leaves the table as it was.
        """
        linears = [linear for linear, _ in entries]
        self._check_places(slot, linears)
        held, widths = self.dtype, []
        for linear, factors in entries:
            for factor in factors:
                held = self._check_factor(linear, factor, held)
            known = {factor.width for factor in factors} - {0}
            if not factors or len(known) > 1:
                raise ShapeMismatch(f"linear {linear}: factors of one width are needed, these have {sorted(known)}")
            widths.append(max(known, default=0))
            if widths[-1]:
                self._check_dim(linear, 1, widths[-1])
        if not entries:
            return
        self._most[slot] = max(self.num_factors(slot), *(len(factors) for _, factors in entries))
        # One upload for all of an adapter.
        numbers = [_tell(factors) for _, factors in entries]
        described = self._upload([number for told in numbers for number in told]).split([len(n) for n in numbers])
        tensors = [
            (told, *(tensor for factor in factors for tensor in factor.tensors()))
            for told, (_, factors) in zip(described, entries, strict=True)
        ]
        self._put(
            slot,
            linears,
            tensors,
            [(0, width) for width in widths],
            pointers=[told.data_ptr() for told in described],
        )
        self._factors.update({(linear, slot): factors for linear, factors in entries})
        for linear, factors in entries:
            self._cuts[linear] |= {(factor.blocks.shape[1], factor.width) for factor in factors}

    def check_width(self, linear: int, width: int) -> None:
        """Raises a ShapeMismatch where an entry of the linear does not cut rows of ``width`` columns."""
        for size, whole in self._cuts[linear]:
            if width % size or whole not in (0, width):
                raise ShapeMismatch(
                    f"linear {linear}: blocks of {size} for {whole or 'any'} do not cut {width} columns"
                )

    def _check_factor(self, linear: int, factor: RotationFactor, held: torch.dtype | None) -> torch.dtype:
        blocks, order = factor
        self._check_tensor("blocks", blocks, 3, FLOAT_DTYPES)
        self._check_value_dtype("blocks", blocks.dtype, held)
        if not blocks.numel() or blocks.shape[1] != blocks.shape[2]:
            raise ShapeMismatch(f"linear {linear}: blocks are {list(blocks.shape)}; [count, b, b] is needed")
        if order is not None:
            self._check_tensor("order", order, 1, (torch.int32,))
            count, size = blocks.shape[:2]
            if order.numel() % size or count not in (1, order.numel() // size):
                raise OutOfRange(f"linear {linear}: {count} blocks of {size} do not cut {order.numel()} places")
        return blocks.dtype

    def _forget(self, linear: int, slot: int) -> None:
        del self._factors[linear, slot]


def _tell(factors: RotationEntry) -> list[int]:
    """How many factors; then of each, as in ``cpu/rotation_ops.inc``: addresses of blocks and order, how many blocks of
    what size, and the width."""
    numbers = [len(factors)]
    for factor in factors:
        order = 0 if factor.order is None else factor.order.data_ptr()
        numbers += [factor.blocks.data_ptr(), order, *factor.blocks.shape[:2], factor.width]
    return numbers
