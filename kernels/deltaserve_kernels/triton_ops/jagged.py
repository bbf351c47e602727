"""Windowed jagged diagonals: a sparse delta laid out so that a kernel reads it in wide, aligned pieces.

Output rows go in windows of 128. Inside a window rows are sorted by their number of nonzeros, most first; a row's place
is its *lane*. *Diagonal* j of a window holds the j-th nonzero of every row that has one: lanes 0 to its length, without
a gap, since shorter rows come later. Each diagonal is padded to 8 entries, which is 16 bytes of 16-bit numbers.

A window may be cut by columns too, into *buckets*: window and bucket make a *cell*, of lanes and diagonals of its own,
so that a program that goes through one cell touches a bounded piece of x. One bucket: a cell is a window.

About 4.2 bytes a nonzero in 16 bits: a value, a 16-bit column, and little else. Plain torch; no GPU, no triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve_kernels.errors import OutOfRange

WINDOW = 128
PAD = 8
MAX_COLUMNS = 1 << 16
MAX_ENTRIES = PAD << 23  # a diagonal's first entry, in units of PAD, has 23 bits of an int32; its length has 8


@dataclass(frozen=True)
class JaggedDelta:
    """One sparse delta of ``num_rows`` output features.

    cols:         int16 [E]    columns, the bits of an unsigned number; padding is 0
    values:       float [E]    padding is 0
    diagonals:    int32 [D]    (first entry / 8) * 256 + length
    cell_first:   int32 [C+1]  cell c has diagonals ``cell_first[c]:cell_first[c+1]``; cell = window * buckets + bucket
    lane_of_row:  int16 [C * 128]  lane of each row of a cell's window, rows past ``num_rows`` too
    num_columns:  largest column + 1
    num_buckets:  buckets of a window
    """

    num_rows: int
    num_columns: int
    num_buckets: int
    cols: Tensor
    values: Tensor
    diagonals: Tensor
    cell_first: Tensor
    lane_of_row: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the pointer table."""
        return self.cols, self.values, self.diagonals, self.cell_first, self.lane_of_row

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device) -> JaggedDelta:
        tensors = (tensor.to(device) for tensor in self.tensors)
        return JaggedDelta(self.num_rows, self.num_columns, self.num_buckets, *tensors)


def from_csr(
    indptr: Tensor, cols: Tensor, values: Tensor, bucket: int = MAX_COLUMNS, num_buckets: int = 1
) -> JaggedDelta:
    """From CSR on the host: indptr int32 [N+1], cols int32 [nnz], values [nnz]; ``num_buckets`` of ``bucket`` columns.

    The order inside a row and a bucket is kept. Raises OutOfRange for a column past the buckets or of 65,536 or more,
    and for more entries than an index holds (67 million).
    """
    num_columns = int(cols.max()) + 1 if cols.numel() else 0
    if num_columns > min(MAX_COLUMNS, bucket * num_buckets):
        raise OutOfRange(
            f"column {num_columns - 1}: {num_buckets} buckets of {bucket} are there, and 16 bits hold {MAX_COLUMNS}"
        )
    num_rows = indptr.numel() - 1
    cells = -(-num_rows // WINDOW) * num_buckets
    row = torch.repeat_interleave(torch.arange(num_rows), indptr.long().diff())
    # A row's part inside one bucket, as if it were a row of its own: cell * 128 + row of the window.
    piece = (row // WINDOW * num_buckets + cols.long() // bucket) * WINDOW + row % WINDOW
    order = piece.argsort(stable=True)
    piece = piece[order]
    counts = torch.bincount(piece, minlength=cells * WINDOW)
    row_of_lane = counts.view(cells, WINDOW).argsort(dim=1, descending=True, stable=True)
    lane_of_row = torch.empty_like(row_of_lane)
    lane_of_row.scatter_(1, row_of_lane, torch.arange(WINDOW).expand(cells, WINDOW))
    cell_first = torch.zeros(cells + 1, dtype=torch.int64)
    cell_first[1:] = counts.view(cells, WINDOW).amax(dim=1).cumsum(0)
    step = torch.arange(piece.numel()) - (counts.cumsum(0) - counts)[piece]
    diagonal = cell_first[piece // WINDOW] + step
    lengths = torch.bincount(diagonal, minlength=int(cell_first[-1]))
    padded = (lengths + PAD - 1) // PAD * PAD
    starts = padded.cumsum(0) - padded
    entries = int(padded.sum())
    if entries > MAX_ENTRIES:
        raise OutOfRange(f"{entries} entries with padding; jagged diagonals hold at most {MAX_ENTRIES}")
    place = starts[diagonal] + lane_of_row.flatten()[piece]
    packed_cols = torch.zeros(entries, dtype=torch.int16)
    packed_cols[place] = cols[order].to(torch.int16)  # the low 16 bits
    packed_values = torch.zeros(entries, dtype=values.dtype)
    packed_values[place] = values[order]
    return JaggedDelta(
        num_rows=num_rows,
        num_columns=num_columns,
        num_buckets=num_buckets,
        cols=packed_cols,
        values=packed_values,
        diagonals=(starts // PAD * 256 + lengths).to(torch.int32),
        cell_first=cell_first.to(torch.int32),
        lane_of_row=lane_of_row.flatten().to(torch.int16),
    )


def to_csr(delta: JaggedDelta) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr, cols, values) as ``from_csr`` was given them, bit for bit, but a row's buckets one after another."""
    cells = delta.cell_first.numel() - 1
    row_of_lane = delta.lane_of_row.view(cells, WINDOW).argsort(dim=1)
    lengths, starts = delta.diagonals.long() % 256, delta.diagonals.long() // 256 * PAD
    diagonal = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    lane = torch.arange(diagonal.numel()) - (lengths.cumsum(0) - lengths)[diagonal]
    cell = torch.searchsorted(delta.cell_first.long(), diagonal, right=True) - 1
    row = cell // delta.num_buckets * WINDOW + row_of_lane[cell, lane]
    # By row, then by bucket; diagonals rise with the position inside a row, so ties are in order.
    order = (row * delta.num_buckets + cell % delta.num_buckets).argsort(stable=True)
    place = (starts[diagonal] + lane)[order]
    indptr = torch.zeros(delta.num_rows + 1, dtype=torch.int32)
    indptr[1:] = torch.bincount(row, minlength=delta.num_rows).cumsum(0)
    return indptr, delta.cols[place].to(torch.int32) & 0xFFFF, delta.values[place]
