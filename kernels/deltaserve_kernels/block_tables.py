"""Tables of row and column blocks: ``delta = put_O(D take_I x)``, a dense block D with lists of what it reads (I) and
writes (O). A list that is left out means all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.errors import OutOfRange, ShapeMismatch
from deltaserve_kernels.pointer_tables import FLOAT_DTYPES, PointerTables
from deltaserve_kernels.tables import RANK_TILE

PITCH = 8  # entries; 16 bytes of 16-bit numbers


class BlockEntry(NamedTuple):
    """A scanned block (``BlockTables.scan``): its contents may be trusted.

    d:        as given
    out_rows: int32 [o] or None;  in_cols: int32 [c] or None
    packed:   d; with both lists [o, c padded to 8] with zeros, so that each row starts on a 16-byte border
    inverse:  int32 [N], place of an output in ``out_rows`` or -1; None without that list
    """

    d: Tensor
    out_rows: Tensor | None
    in_cols: Tensor | None
    in_features: int
    out_features: int
    packed: Tensor
    inverse: Tensor | None

    @property
    def nbytes(self) -> int:
        held = (self.d, self.out_rows, self.in_cols, None if self.packed is self.d else self.packed, self.inverse)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def to(self, device: torch.device) -> BlockEntry:
        d = self.d.to(device)
        return self._replace(
            d=d,
            out_rows=None if self.out_rows is None else self.out_rows.to(device),
            in_cols=None if self.in_cols is None else self.in_cols.to(device),
            packed=d if self.packed is self.d else self.packed.to(device),
            inverse=None if self.inverse is None else self.inverse.to(device),
        )


class BlockTables(PointerTables):
    """Row and column blocks, scaling already folded into D. ``get`` answers (inverse, in_cols, d), empty where all.

    pointers: int64 [num_linears, 3, num_slots]  addresses of in_cols, packed, inverse; 0 where there is none
    sizes:    int32 [num_linears, 2, num_slots]  (listed columns, listed rows); 0 without the list
    row_capacity: listed rows that a launch has room for, a multiple of 16: the most ever set or reserved
    """

    ARRAYS = ("pointers", "sizes")

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_linears, num_slots, device)
        self.row_capacity = RANK_TILE
        self.pointers = self._array(3)
        self.sizes = self._array(2, dtype=torch.int32)
        self._packed: dict[tuple[int, int], Tensor] = {}  # keeps their memory

    def reserve_rows(self, num_rows: int) -> None:
        """Let launches from now on have room for blocks of ``num_rows`` listed rows."""
        self.row_capacity = max(self.row_capacity, -(-num_rows // RANK_TILE) * RANK_TILE)

    def set(
        self,
        linear: int,
        slot: int,
        d: Tensor,
        in_features: int,
        out_features: int,
        *,
        out_rows: Tensor | None = None,
        in_cols: Tensor | None = None,
    ) -> None:
        """Point (linear, slot) at a block, replacing what was there; arguments as for ``scan``.

        Raises a KernelError and leaves the table as it was.
        """
        entry = self.scan(d, in_features, out_features, out_rows=out_rows, in_cols=in_cols)
        self.set_all(slot, ((linear, entry),))

    def scan(
        self,
        d: Tensor,
        in_features: int,
        out_features: int,
        *,
        out_rows: Tensor | None = None,
        in_cols: Tensor | None = None,
    ) -> BlockEntry:
        """The checks of ``set`` that concern one block alone, its contents among them. Changes nothing, and is for any
        device: a block is scanned on the host before it is brought over.

        d: [c, N], D transposed, with ``in_cols`` alone; [o, K] with ``out_rows`` alone; [o, c] with both. Lists are
        int32, strictly ascending, not empty. Contiguous, 16-byte aligned; must not change while the entry stands.
        """
        self._check_form("d", d, 2, FLOAT_DTYPES)
        for name, listed, limit in (("out_rows", out_rows, out_features), ("in_cols", in_cols, in_features)):
            if listed is None:
                continue
            self._check_form(name, listed, 1, (torch.int32,))
            if not listed.numel() or bool((listed.diff() <= 0).any()):
                raise OutOfRange(f"{name} {listed.tolist()[:8]} must be strictly ascending, at least one")
            if int(listed[0]) < 0 or int(listed[-1]) >= limit:
                raise OutOfRange(f"{name} run {int(listed[0])}..{int(listed[-1])}; they must be in 0..{limit - 1}")
        if out_rows is None and in_cols is None:
            raise ShapeMismatch("a block needs out_rows, in_cols or both; without, it is a dense delta")
        rows = out_features if out_rows is None else out_rows.numel()
        cols = in_features if in_cols is None else in_cols.numel()
        due = (cols, rows) if out_rows is None else (rows, cols)
        if tuple(d.shape) != due:
            raise ShapeMismatch(f"d is {list(d.shape)}; {list(due)} is needed for {rows} outputs of {cols} inputs")
        packed, inverse = d, None
        if out_rows is not None and in_cols is not None and cols % PITCH:
            packed = torch.nn.functional.pad(d, (0, -cols % PITCH))
        if out_rows is not None:
            inverse = torch.full((out_features,), -1, dtype=torch.int32, device=d.device)
            inverse[out_rows.long()] = torch.arange(rows, dtype=torch.int32, device=d.device)
        return BlockEntry(d, out_rows, in_cols, in_features, out_features, packed, inverse)

    def set_all(self, slot: int, entries: Sequence[tuple[int, BlockEntry]]) -> None:
        """``set`` for the scanned blocks of a whole adapter: as few tensor operations as for one linear."""
        linears = [linear for linear, _ in entries]
        self._check_places(slot, linears)
        held = self.dtype
        for linear, entry in entries:
            self._check_device("d", entry.d)
            self._check_value_dtype("d", entry.d.dtype, held)
            held = entry.d.dtype
            self._check_dim(linear, 0, entry.in_features)
            self._check_dim(linear, 1, entry.out_features)
        if not entries:
            return
        blocks = [entry for _, entry in entries]
        self.reserve_rows(max(_length(block.out_rows) for block in blocks))
        none = torch.empty(0, dtype=torch.int32, device=self.device)
        self._put(
            slot,
            linears,
            [tuple(none if t is None else t for t in (block.inverse, block.in_cols, block.d)) for block in blocks],
            [(block.in_features, block.out_features) for block in blocks],
            pointers=[[_address(t) for t in (block.in_cols, block.packed, block.inverse)] for block in blocks],
            sizes=[(_length(block.in_cols), _length(block.out_rows)) for block in blocks],
        )
        self._packed.update({(linear, slot): block.packed for linear, block in entries})

    def _forget(self, linear: int, slot: int) -> None:
        self._packed.pop((linear, slot), None)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _length(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()
