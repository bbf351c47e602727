"""Tables from (linear, slot) to the device addresses of adapter matrices. Adapters are data: loading or evicting one
rewrites table rows and nothing else, so a captured graph stays valid.

The tables own no memory of matrices; they keep a reference to each tensor, so that an address is valid as long as its
entry stands. Only the engine thread changes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

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
from deltaserve_kernels.triton_ops.jagged import JaggedDelta, from_csr

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT_BYTES = 16
RANK_TILE = 16
_MAX_INT32 = 2**31 - 1


class _Tables:
    """What both kinds share: sizes, the one dtype, references, the count of filled slots per linear."""

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        if num_linears < 0 or num_slots < 0:
            raise OutOfRange(f"num_linears {num_linears} and num_slots {num_slots} must not be negative")
        self.num_linears = num_linears
        self.num_slots = num_slots
        self.device = torch.device(device)
        self.is_on_host = self.device.type == "cpu"
        self.dtype: torch.dtype | None = None
        self._tensors: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._filled = [0] * num_linears
        self._num_linears_of: Counter[int] = Counter()
        # int32 [num_linears, 2], always on the host: (in_features or 0 while unknown, out_features or 0).
        self.dims = torch.zeros(num_linears, 2, dtype=torch.int32)
        self._known = self.dims.numpy()  # the same memory: reading single numbers from a tensor is slow

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

    def grow(self, num_slots: int) -> None:
        """Enlarge to ``num_slots`` slots; entries keep their places. Tables are reallocated, so captured graphs die."""
        if num_slots < self.num_slots:
            raise OutOfRange(f"cannot shrink from {self.num_slots} to {num_slots} slots")
        self._grow_tables(num_slots - self.num_slots)
        self.num_slots = num_slots

    def clear(self, slot: int) -> None:
        """Empty a slot in every linear and let go of its tensors. Emptying an empty slot is fine."""
        self._check_slot(slot)
        for linear in range(self.num_linears):
            if self._tensors.pop((linear, slot), None) is not None:
                self._filled[linear] -= 1
        self._num_linears_of.pop(slot, None)
        self._clear_tables(slot)

    def _grow_tables(self, extra: int) -> None:
        raise NotImplementedError

    def _clear_tables(self, slot: int) -> None:
        raise NotImplementedError

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise OutOfRange(f"slot {slot} is not in 0..{self.num_slots - 1}")

    def _check_linear(self, linear: int) -> None:
        if not 0 <= linear < self.num_linears:
            raise OutOfRange(f"linear {linear} is not in 0..{self.num_linears - 1}")

    def _check_tensor(self, name: str, tensor: Tensor, dims: int, dtypes: tuple[torch.dtype, ...]) -> None:
        if tensor.dtype not in dtypes:
            raise DtypeMismatch(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
        if tensor.dim() != dims:
            raise ShapeMismatch(f"{name} has shape {list(tensor.shape)}; {dims} dimension(s) are needed")
        if tensor.device.type != self.device.type:
            raise DeviceMismatch(f"{name} is on {tensor.device}; the table is on {self.device}")
        if not tensor.is_contiguous():
            raise NotContiguous(f"{name} {list(tensor.shape)} has strides {tensor.stride()}; make it contiguous")
        if tensor.numel() and tensor.data_ptr() % ALIGNMENT_BYTES:
            raise Misaligned(f"{name} starts at {tensor.data_ptr():#x}, not on a 16-byte border; copy it")

    def _check_value_dtype(self, name: str, dtype: torch.dtype, held: torch.dtype | None) -> None:
        if held is not None and dtype != held:
            raise DtypeMismatch(f"{name} is {dtype}; this table holds {held}")

    def _check_distinct(self, linears: Sequence[int]) -> None:
        if len(set(linears)) != len(linears):
            raise OutOfRange("a linear is given twice; a slot has one entry for each")

    def _check_dim(self, linear: int, axis: int, size: int) -> None:
        known = int(self._known[linear, axis])
        if known and known != size:
            side = ("in", "out")[axis]
            raise ShapeMismatch(f"linear {linear}: {side}_features {size} differs from the {known} of earlier entries")

    def _upload(self, numbers: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        return upload(torch.tensor(numbers, dtype=dtype), self.device)

    def _keep(self, linear: int, slot: int, tensors: tuple[Tensor, ...]) -> None:
        if (linear, slot) not in self._tensors:
            self._filled[linear] += 1
            self._num_linears_of[slot] += 1
        self._tensors[(linear, slot)] = tensors
        self.dtype = tensors[-1].dtype


class LoraTables(_Tables):
    """Low-rank terms: ``delta = b_t^T (a x)`` at true rank, scaling already folded into ``b_t``.

    pointers: int64 [num_linears, 2, num_slots]  address of A [r, K], of B transposed [r, N]; 0 where empty
    ranks:    int32 [num_linears, num_slots]     0 where empty
    rank_in_use:   the largest rank ever set, rounded up to 16: the room a shrunk row needs
    rank_capacity: the same of what was reserved too: the room it has in captured launches. Kernels read true ranks.
    """

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_linears, num_slots, device)
        self.rank_in_use = RANK_TILE
        self.rank_capacity = RANK_TILE
        self._largest_rank: dict[int, int] = {}
        self.pointers = torch.zeros(num_linears, 2, num_slots, dtype=torch.int64, device=self.device)
        self.ranks = torch.zeros(num_linears, num_slots, dtype=torch.int32, device=self.device)

    def reserve_rank(self, rank: int) -> None:
        """Let launches captured from now on have room for ``rank``, so that they serve every adapter up to it."""
        self.rank_capacity = max(self.rank_capacity, -(-rank // RANK_TILE) * RANK_TILE)

    def largest_rank(self, slot: int) -> int:
        """A bound on the ranks of a slot's entries; 0 where it has none."""
        return self._largest_rank.get(slot, 0)

    def set(self, linear: int, slot: int, a: Tensor, b_t: Tensor) -> None:
        """Point (linear, slot) at ``a`` [r, K] and ``b_t`` [r, N], replacing what was there.

        Same float dtype as every other entry, contiguous, 16-byte aligned, r >= 1. The caller must not change the
        tensors while the entry stands. Raises a KernelError and leaves the table as it was.
        """
        self.set_all(slot, ((linear, a, b_t),))

    def set_all(self, slot: int, entries: Sequence[tuple[int, Tensor, Tensor]]) -> None:
        """``set`` for (linear, a, b_t) of a whole adapter: as few tensor operations as for one linear."""
        self._check_slot(slot)
        linears = [linear for linear, _, _ in entries]
        self._check_distinct(linears)
        held = self.dtype
        for linear, a, b_t in entries:
            self._check_linear(linear)
            for name, tensor in (("a", a), ("b_t", b_t)):
                self._check_tensor(name, tensor, 2, FLOAT_DTYPES)
                self._check_value_dtype(name, tensor.dtype, held)
            if a.dtype != b_t.dtype:
                raise DtypeMismatch(f"a is {a.dtype} and b_t {b_t.dtype}; both must be the same")
            held = a.dtype
            if a.shape[0] != b_t.shape[0] or a.shape[0] < 1 or not a.shape[1] or not b_t.shape[1]:
                raise ShapeMismatch(f"a {list(a.shape)} and b_t {list(b_t.shape)} must be [r, K] and [r, N], r >= 1")
            self._check_dim(linear, 0, a.shape[1])
            self._check_dim(linear, 1, b_t.shape[1])
        if not entries:
            return
        for linear, a, b_t in entries:
            self._keep(linear, slot, (a, b_t))
        largest = max(a.shape[0] for _, a, _ in entries)
        self._largest_rank[slot] = max(largest, self.largest_rank(slot))
        self.rank_in_use = max(self.rank_in_use, -(-largest // RANK_TILE) * RANK_TILE)
        self.reserve_rank(largest)
        self.dims[linears] = torch.tensor([(a.shape[1], b_t.shape[1]) for _, a, b_t in entries], dtype=torch.int32)
        addresses = [(a.data_ptr(), b_t.data_ptr()) for _, a, b_t in entries]
        index = self._upload(linears)
        self.pointers[index, :, slot] = self._upload(addresses)
        self.ranks[index, slot] = self._upload([a.shape[0] for _, a, _ in entries], torch.int32)

    def _grow_tables(self, extra: int) -> None:
        self.pointers = torch.nn.functional.pad(self.pointers, (0, extra))
        self.ranks = torch.nn.functional.pad(self.ranks, (0, extra))

    def _clear_tables(self, slot: int) -> None:
        self._largest_rank.pop(slot, None)
        self.pointers[:, :, slot] = 0
        self.ranks[:, slot] = 0


class SparseEntry(NamedTuple):
    """A scanned CSR delta (``SparseTables.scan``): its contents may be trusted. ``num_columns``: largest column + 1.
    ``jagged``: the same delta as Triton kernels read it, where tables keep that form."""

    indptr: Tensor
    cols: Tensor
    values: Tensor
    num_columns: int
    jagged: JaggedDelta | None = None


class SparseTables(_Tables):
    """Unstructured sparse terms in CSR over output features: ``delta[n] = sum_j values[j] * x[cols[j]]`` for
    ``indptr[n] <= j < indptr[n+1]``, scaling already folded into ``values``.

    pointers: int64 [num_linears, 3, num_slots]  addresses of indptr int32 [N+1], cols int32 [nnz], values [nnz]
    extents:  int32 [num_linears, 2, num_slots]  (nnz, largest column + 1); 0 where empty
    jagged_pointers: int64 [num_linears, 5, num_slots]  the arrays of ``JaggedDelta.tensors``; 0 where empty. Kept from
                     ``keep_jagged`` on, for Triton kernels; None before.
    """

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_linears, num_slots, device)
        self.jagged_pointers: Tensor | None = None
        self._jagged: dict[tuple[int, int], JaggedDelta] = {}
        self.pointers = torch.zeros(num_linears, 3, num_slots, dtype=torch.int64, device=self.device)
        self.extents = torch.zeros(num_linears, 2, num_slots, dtype=torch.int32, device=self.device)

    def set(self, linear: int, slot: int, indptr: Tensor, cols: Tensor, values: Tensor) -> None:
        """Point (linear, slot) at a CSR delta, replacing what was there.

        Contiguous, 16-byte aligned; ``indptr`` rises from 0 to nnz; columns are not negative (that they are below K
        is checked when the operator meets ``x``). Contents are scanned once here and must not change while the entry
        stands. Raises a KernelError and leaves the table as it was.
        """
        self.set_all(slot, ((linear, self.scan(indptr, cols, values)),))

    def scan(self, indptr: Tensor, cols: Tensor, values: Tensor) -> SparseEntry:
        """The checks of ``set`` that concern one delta alone, its contents among them. Changes nothing: callable from
        any thread, so that large deltas do not hold up the one that changes the tables.
        """
        self._check_tensor("indptr", indptr, 1, (torch.int32,))
        self._check_tensor("cols", cols, 1, (torch.int32,))
        self._check_tensor("values", values, 1, FLOAT_DTYPES)
        nnz = values.numel()
        if indptr.numel() < 2 or cols.numel() != nnz or nnz > _MAX_INT32:
            raise ShapeMismatch(
                f"indptr [{indptr.numel()}], cols [{cols.numel()}], values [{nnz}] must be [N+1], [nnz], [nnz], N >= 1"
            )
        if int(indptr[0]) != 0 or int(indptr[-1]) != nnz or bool((indptr[1:] < indptr[:-1]).any()):
            raise OutOfRange(f"indptr must rise from 0 to nnz = {nnz}; it runs {int(indptr[0])}..{int(indptr[-1])}")
        low, high = (int(cols.min()), int(cols.max())) if nnz else (0, -1)
        if low < 0 or high == _MAX_INT32:
            raise OutOfRange(f"cols run {low}..{high}; they must be in 0..K-1")
        twin = self._to_jagged(indptr, cols, values) if self.jagged_pointers is not None else None
        return SparseEntry(indptr, cols, values, high + 1, twin)

    def keep_jagged(self) -> Tensor:
        """``jagged_pointers``. From the first call on every entry is kept as jagged diagonals too: those that are there
        are converted now, later ones by ``scan``. Raises OutOfRange for a column that 16 bits do not hold."""
        if self.jagged_pointers is None:
            twins = {place: self._to_jagged(*tensors) for place, tensors in self._tensors.items()}
            shape = (self.num_linears, 5, self.num_slots)
            with torch.inference_mode(False):  # the first call may come from a pass; later entries come from outside
                self.jagged_pointers = torch.zeros(shape, dtype=torch.int64, device=self.device)
            for (linear, slot), twin in twins.items():
                self._point_jagged(slot, {linear: twin})
        return self.jagged_pointers

    def expect_columns(self, linear: int, in_features: int) -> None:
        """Tell how many inputs a linear has, so that no later entry may have more columns: a captured launch does not
        look. Raises OutOfRange when an entry has more already."""
        if self._known[linear, 0]:
            return
        for (held, slot), twin in self._jagged.items():
            if held == linear and twin.num_columns > in_features:
                raise OutOfRange(f"linear {linear}, slot {slot}: column {twin.num_columns - 1}, x has {in_features}")
        self.dims[linear, 0] = in_features

    def _to_jagged(self, indptr: Tensor, cols: Tensor, values: Tensor) -> JaggedDelta:
        return from_csr(indptr.cpu(), cols.cpu(), values.cpu()).to(self.device)

    def _point_jagged(self, slot: int, twins: dict[int, JaggedDelta]) -> None:
        if self.jagged_pointers is None or not twins:
            return
        self._jagged.update({(linear, slot): twin for linear, twin in twins.items()})
        addresses = [[tensor.data_ptr() for tensor in twin.tensors] for twin in twins.values()]
        self.jagged_pointers[self._upload(list(twins)), :, slot] = self._upload(addresses)

    def set_all(self, slot: int, entries: Sequence[tuple[int, SparseEntry]]) -> None:
        """``set`` for the scanned deltas of a whole adapter: as few tensor operations as for one linear."""
        self._check_slot(slot)
        linears = [linear for linear, _ in entries]
        self._check_distinct(linears)
        held = self.dtype
        for linear, entry in entries:
            self._check_linear(linear)
            self._check_value_dtype("values", entry.values.dtype, held)
            held = entry.values.dtype
            self._check_dim(linear, 1, entry.indptr.numel() - 1)
            if 0 < self._known[linear, 0] < entry.num_columns:
                raise OutOfRange(f"linear {linear}: column {entry.num_columns - 1}, x has {self._known[linear, 0]}")
        if not entries:
            return
        # Scanned before this form was kept: converted here, where it holds up the caller.
        is_jagged = self.jagged_pointers is not None
        twins = {linear: e.jagged or self._to_jagged(*e[:3]) for linear, e in entries} if is_jagged else {}
        for linear, entry in entries:
            self._keep(linear, slot, (entry.indptr, entry.cols, entry.values))
        self.dims[linears, 1] = torch.tensor([entry.indptr.numel() - 1 for _, entry in entries], dtype=torch.int32)
        addresses = [(e.indptr.data_ptr(), e.cols.data_ptr(), e.values.data_ptr()) for _, e in entries]
        extents = [(entry.values.numel(), entry.num_columns) for _, entry in entries]
        index = self._upload(linears)
        self.pointers[index, :, slot] = self._upload(addresses)
        self.extents[index, :, slot] = self._upload(extents, torch.int32)
        self._point_jagged(slot, twins)

    def _grow_tables(self, extra: int) -> None:
        self.pointers = torch.nn.functional.pad(self.pointers, (0, extra))
        self.extents = torch.nn.functional.pad(self.extents, (0, extra))
        if self.jagged_pointers is not None:
            self.jagged_pointers = torch.nn.functional.pad(self.jagged_pointers, (0, extra))

    def _clear_tables(self, slot: int) -> None:
        self.pointers[:, :, slot] = 0
        self.extents[:, :, slot] = 0
        if self.jagged_pointers is not None:
            self.jagged_pointers[:, :, slot] = 0
            for linear in range(self.num_linears):
                self._jagged.pop((linear, slot), None)
