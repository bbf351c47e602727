"""Tables from (linear, slot) to the device addresses of adapter matrices. Adapters are data: loading or evicting one
rewrites table rows and nothing else, so a captured graph stays valid. ``pointer_tables`` has what all kinds share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.errors import DtypeMismatch, OutOfRange, ShapeMismatch
from deltaserve_kernels.pointer_tables import FLOAT_DTYPES, PointerTables
from deltaserve_kernels.triton_ops.jagged import JaggedDelta, from_csr, to_csr

RANK_TILE = 16
_MAX_INT32 = 2**31 - 1


class LoraTables(PointerTables):
    """Low-rank terms: ``delta = b_t^T (a x)`` at true rank, scaling already folded into ``b_t``.

    pointers: int64 [num_linears, 2, num_slots]  address of A [r, K], of B transposed [r, N]; 0 where empty
    ranks:    int32 [num_linears, num_slots]     0 where empty
    rank_in_use:   the largest rank ever set, rounded up to 16: the room a shrunk row needs
    rank_capacity: the same of what was reserved too: the room it has in captured launches. Kernels read true ranks.
    """

    ARRAYS = ("pointers", "ranks")

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_linears, num_slots, device)
        self.rank_in_use = RANK_TILE
        self.rank_capacity = RANK_TILE
        self._largest_rank: dict[int, int] = {}
        self.pointers = self._array(2)
        self.ranks = self._array(dtype=torch.int32)

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
        linears = [linear for linear, _, _ in entries]
        self._check_places(slot, linears)
        held = self.dtype
        for linear, a, b_t in entries:
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
        ranks = [a.shape[0] for _, a, _ in entries]
        self._largest_rank[slot] = max(*ranks, self.largest_rank(slot))
        self.rank_in_use = max(self.rank_in_use, -(-max(ranks) // RANK_TILE) * RANK_TILE)
        self.reserve_rank(max(ranks))
        self._put(
            slot,
            linears,
            [(a, b_t) for _, a, b_t in entries],
            [(a.shape[1], b_t.shape[1]) for _, a, b_t in entries],
            pointers=[(a.data_ptr(), b_t.data_ptr()) for _, a, b_t in entries],
            ranks=ranks,
        )

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self._largest_rank.pop(slot, None)


class SparseEntry(NamedTuple):
    """A scanned sparse delta (``SparseTables.scan``): its contents may be trusted. ``num_columns``: largest column + 1.

    ``jagged``: the same delta as Triton kernels read it, where tables keep that form. The CSR arrays are empty where
    they keep no other.
    """

    indptr: Tensor
    cols: Tensor
    values: Tensor
    num_columns: int
    jagged: JaggedDelta | None = None

    @property
    def num_rows(self) -> int:
        return self.jagged.num_rows if self.jagged is not None else self.indptr.numel() - 1

    @property
    def nbytes(self) -> int:
        """Of every form it has."""
        return sum(tensor.nbytes for tensor in self[:3]) + (self.jagged.nbytes if self.jagged is not None else 0)

    def to(self, device: torch.device) -> SparseEntry:
        """In the memory of another device; the same tensors where they are there already."""
        indptr, cols, values = (tensor.to(device) for tensor in self[:3])
        jagged = None if self.jagged is None else self.jagged.to(device)
        return SparseEntry(indptr, cols, values, self.num_columns, jagged)


class SparseTables(PointerTables):
    """Unstructured sparse terms in CSR over output features: ``delta[n] = sum_j values[j] * x[cols[j]]`` for
    ``indptr[n] <= j < indptr[n+1]``, scaling already folded into ``values``.

    pointers: int64 [num_linears, 3, num_slots]  addresses of indptr int32 [N+1], cols int32 [nnz], values [nnz]
    extents:  int32 [num_linears, 2, num_slots]  (nnz, largest column + 1); 0 where empty
    jagged_pointers: int64 [num_linears, 5, num_slots]  the arrays of ``JaggedDelta.tensors``; 0 where empty. Kept from
                     ``keep_jagged`` on, for Triton kernels; None before.
    has_csr:  False: only the jagged form is held, for devices whose operators read no other. ``pointers`` and nnz stay
              0, the C++ operators refuse the tables, and ``get`` makes its answer anew.
    """

    ARRAYS = ("pointers", "extents", "jagged_pointers")

    def __init__(
        self, num_linears: int, num_slots: int, device: torch.device | str = "cpu", *, has_csr: bool = True
    ) -> None:
        super().__init__(num_linears, num_slots, device)
        self.has_csr = has_csr
        self.pointers = self._array(3)
        self.extents = self._array(2, dtype=torch.int32)
        self.jagged_pointers = None if has_csr else self._array(5)
        self._jagged: dict[tuple[int, int], JaggedDelta] = {}

    def get(self, linear: int, slot: int) -> tuple[Tensor, ...] | None:
        """(indptr, cols, values) of an entry, or None."""
        entry = super().get(linear, slot)
        if entry is None or self.has_csr:
            return entry
        return tuple(tensor.to(self.device) for tensor in to_csr(self._jagged[linear, slot].to(torch.device("cpu"))))

    def set(self, linear: int, slot: int, indptr: Tensor, cols: Tensor, values: Tensor) -> None:
        """Point (linear, slot) at a CSR delta, replacing what was there.

        Contiguous, 16-byte aligned; ``indptr`` rises from 0 to nnz; columns are not negative (that they are below K
        is checked when the operator meets ``x``). Contents are scanned once here and must not change while the entry
        stands. Raises a KernelError and leaves the table as it was.
        """
        self.set_all(slot, ((linear, self.scan(indptr, cols, values)),))

    def scan(self, indptr: Tensor, cols: Tensor, values: Tensor) -> SparseEntry:
        """The checks of ``set`` that concern one delta alone, its contents among them, and its conversion. Changes
        nothing: callable from any thread, so that large deltas do not hold up the one that changes the tables.

        The tensors may be on the host, where all this is cheapest; the entry is where they are. Bring it over (``to``)
        before it is set.
        """
        for name, tensor, dtypes in (
            ("indptr", indptr, (torch.int32,)),
            ("cols", cols, (torch.int32,)),
            ("values", values, FLOAT_DTYPES),
        ):
            self._check_form(name, tensor, 1, dtypes)
            if tensor.device.type != "cpu" or values.device.type != "cpu":
                self._check_device(name, tensor)
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
        return self._formed(SparseEntry(indptr, cols, values, high + 1))

    def _formed(self, entry: SparseEntry) -> SparseEntry:
        """The entry in the forms that the tables hold."""
        if self.jagged_pointers is None:
            return entry
        indptr, cols, values = entry[:3]
        jagged = entry.jagged or _to_jagged(indptr, cols, values)
        if not self.has_csr:
            indptr, cols, values = (tensor.new_empty(0) for tensor in (indptr, cols, values))
        return SparseEntry(indptr, cols, values, entry.num_columns, jagged)

    def keep_jagged(self) -> Tensor:
        """``jagged_pointers``. From the first call on every entry is kept as jagged diagonals too: those that are there
        are converted now, later ones by ``scan``. Raises OutOfRange for a column that 16 bits do not hold."""
        if self.jagged_pointers is None:
            twins = {place: _to_jagged(*tensors) for place, tensors in self._tensors.items()}
            with torch.inference_mode(False):  # the first call may come from a pass; later entries come from outside
                self.jagged_pointers = self._array(5)
            for (linear, slot), twin in twins.items():
                self.jagged_pointers[linear, :, slot] = self._upload(_addresses(twin))
            self._jagged.update(twins)
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

    def set_all(self, slot: int, entries: Sequence[tuple[int, SparseEntry]]) -> None:
        """``set`` for the scanned deltas of a whole adapter: as few tensor operations as for one linear."""
        linears = [linear for linear, _ in entries]
        self._check_places(slot, linears)
        held = self.dtype
        for linear, entry in entries:
            if self.has_csr and not entry.indptr.numel():
                raise ShapeMismatch(f"linear {linear}: the entry has no CSR form, which these tables hold")
            self._check_device("values", entry.values)
            self._check_value_dtype("values", entry.values.dtype, held)
            held = entry.values.dtype
            self._check_dim(linear, 1, entry.num_rows)
            if 0 < self._known[linear, 0] < entry.num_columns:
                raise OutOfRange(f"linear {linear}: column {entry.num_columns - 1}, x has {self._known[linear, 0]}")
        if not entries:
            return
        # What was scanned before the jagged form was kept is converted here, where it holds up the caller.
        formed = [self._formed(entry) for _, entry in entries]
        arrays: dict[str, Sequence[object]] = {
            "pointers": [[tensor.data_ptr() for tensor in entry[:3]] for entry in formed],
            "extents": [(entry.values.numel(), entry.num_columns) for entry in formed],
        }
        twins = {(linear, slot): e.jagged for linear, e in zip(linears, formed, strict=True) if e.jagged is not None}
        if twins:
            arrays["jagged_pointers"] = [_addresses(twin) for twin in twins.values()]
        self._jagged.update(twins)
        tensors = [(entry.indptr, entry.cols, entry.values) for entry in formed]
        self._put(slot, linears, tensors, [(0, entry.num_rows) for entry in formed], **arrays)

    def _forget(self, linear: int, slot: int) -> None:
        self._jagged.pop((linear, slot), None)


def _to_jagged(indptr: Tensor, cols: Tensor, values: Tensor) -> JaggedDelta:
    return from_csr(indptr.cpu(), cols.cpu(), values.cpu()).to(values.device)


def _addresses(delta: JaggedDelta) -> list[int]:
    return [tensor.data_ptr() for tensor in delta.tensors]
