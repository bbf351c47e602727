"""Positions of a sparse delta: in range, unique, sorted by row and then column."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.spec import LinearSpec


def check_positions(where: str, rows: Tensor, cols: Tensor, linear: LinearSpec, findings: Findings) -> bool:
    """Whether all positions lie inside ``[out_features, in_features]``. ``rows``, ``cols``: integer ``[k]``, k >= 1."""
    inside = True
    for axis, indices, size in (("row", rows, linear.out_features), ("column", cols, linear.in_features)):
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < 0 or high >= size:
            findings.add("index_out_of_range", where, f"{axis}s {low} to {high}", f"{axis}s 0 to {size - 1}")
            inside = False
    return inside


def keys_of(rows: Tensor, cols: Tensor, in_features: int) -> Tensor:
    """Position in the row-major flat weight, int64 ``[k]``: ordering and uniqueness of entries in one number."""
    return rows.to(torch.int64) * in_features + cols.to(torch.int64)


def sort_entries(rows: Tensor, cols: Tensor, values: Tensor, in_features: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Entries by row, then column, as int32 rows and cols; the last item counts positions that occur again."""
    keys, order = torch.sort(keys_of(rows, cols, in_features), stable=True)
    num_duplicates = int((keys[1:] == keys[:-1]).sum())
    return (
        rows[order].to(torch.int32).contiguous(),
        cols[order].to(torch.int32).contiguous(),
        values[order].contiguous(),
        num_duplicates,
    )
