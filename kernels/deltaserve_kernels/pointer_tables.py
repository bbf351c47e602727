"""What all tables share: a place for each (linear, slot), arrays of addresses on the device, checks on the way in.

The tables own no memory of matrices; they keep a reference to each tensor, so that an address is valid as long as its
entry stands. Only the engine thread changes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from deltaserve_kernels.errors import (
    DeviceMismatch,
    DtypeMismatch,
    Misaligned,
    NotContiguous,
    OutOfRange,
    ShapeMismatch,
)
from deltaserve_kernels.transfer import upload

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT_BYTES = 16


class PointerTables:
    """Sizes, the one dtype, references, arrays and their checks. A subclass checks what its kind of entry must be.

    ``ARRAYS`` names the attributes that kernels read: device tensors [num_linears, ..., num_slots], 0 where empty, or
    None while they are not kept. ``NOUN``: what errors call the first index.
    """

    ARRAYS: ClassVar[tuple[str, ...]] = ("pointers",)
    NOUN: ClassVar[str] = "linear"

    pointers: Tensor

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        if num_linears < 0 or num_slots < 0:
            raise OutOfRange(f"num_linears {num_linears} and num_slots {num_slots} must not be negative")
        self.num_linears = num_linears
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.is_on_host = self.device.type == "cpu"
        self.dtype: torch.dtype | None = None
        self.version = 0
        """Rises with every change: what was found out about the table holds while it stays."""
        self._tensors: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._filled = [0] * num_linears
        self._num_linears_of: Counter[int] = Counter()
        # int32 [num_linears, 2], always on the host: (in_features or 0 while unknown, out_features or 0).
        self.dims = torch.zeros(num_linears, 2, dtype=torch.int32)
        self._known = self.dims.numpy()  # the same memory: reading single numbers from a tensor is slow

    @property
    def is_empty(self) -> bool:
        """True when no slot has an entry."""
        return not self._num_linears_of

    def has_any(self, linear: int) -> bool:
        """True when some slot has an entry for this linear; False lets a caller skip the operator."""
        return self._filled[linear] > 0

    def has_any_of(self, members: Sequence[tuple[int, int, int]]) -> bool:
        """``has_any`` for some linear of a group: (linear, start, stop). Asked at every group of every layer."""
        if not self._num_linears_of:
            return False
        filled = self._filled
        for member in members:  # noqa: SIM110  a generator costs more than the few looks
            if filled[member[0]]:
                return True
        return False

    def shape_of(self, linear: int) -> tuple[int, int]:
        """(in_features, out_features) of a linear, 0 while unknown."""
        return int(self._known[linear, 0]), int(self._known[linear, 1])

    def has_slot(self, slot: int) -> bool:
        """True when the slot has an entry for some linear."""
        return slot in self._num_linears_of

    def get(self, linear: int, slot: int) -> tuple[Tensor, ...] | None:
        """The tensors of an entry, in the order ``set`` took them, or None."""
        return self._tensors.get((linear, slot))

    def mark(self, linear: int, slot: int) -> object | None:
        """An object that stands for the entry and for no other, or None: tells whether an entry was replaced."""
        return self._tensors.get((linear, slot))

    def grow(self, num_slots: int) -> None:
        """Enlarge to ``num_slots`` slots; entries keep their places. Tables are reallocated, so captured graphs die."""
        if num_slots < self.num_slots:
            raise OutOfRange(f"cannot shrink from {self.num_slots} to {num_slots} slots")
        for name in self.ARRAYS:
            array: Tensor | None = getattr(self, name)
            if array is not None:
                setattr(self, name, torch.nn.functional.pad(array, (0, num_slots - self.num_slots)))
        self.num_slots = num_slots
        self.version += 1

    def clear(self, slot: int) -> None:
        """Empty a slot in every linear and let go of its tensors. Emptying an empty slot is fine."""
        self._check_slot(slot)
        self.version += 1
        for linear in range(self.num_linears):
            if self._tensors.pop((linear, slot), None) is not None:
                self._filled[linear] -= 1
                self._forget(linear, slot)
        self._num_linears_of.pop(slot, None)
        for name in self.ARRAYS:
            array: Tensor | None = getattr(self, name)
            if array is not None:
                array[..., slot] = 0

    def _forget(self, linear: int, slot: int) -> None:
        """Let go of what a subclass keeps of an entry besides its tensors."""

    def _array(self, *rows: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """An empty array: ``rows`` numbers for each place."""
        return torch.zeros(self.num_linears, *rows, self.num_slots, dtype=dtype, device=self.device)

    def _put(
        self,
        slot: int,
        linears: Sequence[int],
        tensors: Sequence[tuple[Tensor, ...]],
        dims: Sequence[tuple[int, int]],
        **arrays: Sequence[object],
    ) -> None:
        """Write entries that are checked: what ``get`` answers, (in, out) features (0: says nothing), and the numbers
        of each array named. As few tensor operations for many linears as for one."""
        self.version += 1
        for linear, of_entry in zip(linears, tensors, strict=True):
            if (linear, slot) not in self._tensors:
                self._filled[linear] += 1
                self._num_linears_of[slot] += 1
            self._tensors[linear, slot] = of_entry
            self.dtype = of_entry[-1].dtype
        told, places = np.array(dims, dtype=np.int32), list(linears)
        self._known[places] = np.where(told > 0, told, self._known[places])
        index = self._upload(linears)
        for name, numbers in arrays.items():
            array: Tensor = getattr(self, name)
            array[index, ..., slot] = self._upload(numbers, array.dtype)

    def _upload(self, numbers: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        return upload(torch.tensor(numbers, dtype=dtype), self.device)

    def _check_places(self, slot: int, linears: Collection[int]) -> None:
        """The places of one adapter's entries: inside the table, none twice."""
        self._check_slot(slot)
        for linear in linears:
            if not 0 <= linear < self.num_linears:
                raise OutOfRange(f"{self.NOUN} {linear} is not in 0..{self.num_linears - 1}")
        if len(set(linears)) != len(linears):
            raise OutOfRange(f"a {self.NOUN} is given twice; a slot has one entry for each")

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise OutOfRange(f"slot {slot} is not in 0..{self.num_slots - 1}")

    def _check_tensor(self, name: str, tensor: Tensor, dims: int, dtypes: tuple[torch.dtype, ...]) -> None:
        self._check_form(name, tensor, dims, dtypes)
        self._check_device(name, tensor)

    def _check_form(self, name: str, tensor: Tensor, dims: int, dtypes: tuple[torch.dtype, ...]) -> None:
        if tensor.dtype not in dtypes:
            raise DtypeMismatch(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
        if tensor.dim() != dims:
            raise ShapeMismatch(f"{name} has shape {list(tensor.shape)}; {dims} dimension(s) are needed")
        if not tensor.is_contiguous():
            raise NotContiguous(f"{name} {list(tensor.shape)} has strides {tensor.stride()}; make it contiguous")
        if tensor.numel() and tensor.data_ptr() % ALIGNMENT_BYTES:
            raise Misaligned(f"{name} starts at {tensor.data_ptr():#x}, not on a 16-byte border; copy it")

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device.type != self.device.type:
            raise DeviceMismatch(f"{name} is on {tensor.device}; the table is on {self.device}")

    def _check_value_dtype(self, name: str, dtype: torch.dtype, held: torch.dtype | None) -> None:
        if held is not None and dtype != held:
            raise DtypeMismatch(f"{name} is {dtype}; this table holds {held}")

    def _check_dim(self, linear: int, axis: int, size: int) -> None:
        known = int(self._known[linear, axis])
        if known and known != size:
            side = ("in", "out")[axis]
            raise ShapeMismatch(
                f"{self.NOUN} {linear}: {side}_features {size} differs from the {known} of earlier entries"
            )
