"""Jagged copies of sparse deltas with columns in buckets, beside those without, which ``SparseTables`` keeps itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deltaserve_kernels.tables import SparseTables
from deltaserve_kernels.transfer import upload
from deltaserve_kernels.triton_ops.jagged import JaggedDelta, from_csr


class BucketedTables:
    """Device addresses of jagged deltas with buckets of ``bucket`` columns, following one ``SparseTables``.

    pointers: int64 [num_linears, 5, num_slots]  the arrays of ``JaggedDelta.tensors``; 0 where empty
    """

    def __init__(self, tables: SparseTables, bucket: int) -> None:
        self.bucket = bucket
        shape = (tables.num_linears, 5, tables.num_slots)
        self.pointers = torch.zeros(shape, dtype=torch.int64, device=tables.device)
        # The mark of what an entry was made from, to see when it is replaced, and the entry, to keep its memory.
        self._held: dict[tuple[int, int], tuple[object, JaggedDelta]] = {}

    def follow(self, tables: SparseTables, linear: int, in_features: int) -> None:
        """Bring one linear's entries up to date. Converts what is new on the host, once an entry: for eager steps, not
        for captured ones. Raises OutOfRange for a column that the buckets or 16 bits do not hold."""
        for slot in range(tables.num_slots):
            mark, held = tables.mark(linear, slot), self._held.get((linear, slot))
            if mark is None:
                if held is not None:
                    del self._held[linear, slot]
                    self.pointers[linear, :, slot] = 0
            elif held is None or held[0] is not mark:
                indptr, cols, values = (tensor.cpu() for tensor in tables.get(linear, slot) or ())
                delta = from_csr(indptr, cols, values, self.bucket, -(-in_features // self.bucket)).to(tables.device)
                addresses = torch.tensor([tensor.data_ptr() for tensor in delta.tensors])
                self.pointers[linear, :, slot] = upload(addresses, tables.device)
                self._held[linear, slot] = (mark, delta)


_followers = WeakIdKeyDictionary()


def pointers(tables: SparseTables, linears: Sequence[int], in_features: int, bucket: int) -> Tensor:
    """The pointer table of ``tables`` with this bucket, up to date for these linears of ``in_features`` inputs each.

    Made anew when the number of slots has changed. Raises OutOfRange as ``BucketedTables.follow``.
    """
    of_tables: dict[int, BucketedTables] | None = _followers.get(tables)
    if of_tables is None:
        of_tables = _followers[tables] = {}
    if bucket not in of_tables or of_tables[bucket].pointers.shape[2] != tables.num_slots:
        of_tables[bucket] = BucketedTables(tables, bucket)
    for linear in linears:
        of_tables[bucket].follow(tables, linear, in_features)
    return of_tables[bucket].pointers
