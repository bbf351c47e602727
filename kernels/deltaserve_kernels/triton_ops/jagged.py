"""Windowed jagged diagonals: a sparse delta laid out so that a kernel reads it in wide, aligned pieces.

Output rows go in windows of 128. Inside a window rows are sorted by their number of nonzeros, most first; a row's place
is its *lane*. *Diagonal* j of a window holds the j-th nonzero of every row that has one: lanes 0 to its length, without
a gap, since shorter rows come later. Each diagonal is padded to 8 entries, which is 16 bytes of 16-bit numbers.

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
    window_first: int32 [W+1]  window w has diagonals ``window_first[w]:window_first[w+1]``
    lane_of_row:  int16 [W * 128]  lane of each row of a window, rows past ``num_rows`` too
    num_columns:  largest column + 1
    """

    num_rows: int
    num_columns: int
    cols: Tensor
    values: Tensor
    diagonals: Tensor
    window_first: Tensor
    lane_of_row: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the pointer table."""
        return self.cols, self.values, self.diagonals, self.window_first, self.lane_of_row

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device) -> JaggedDelta:
        return JaggedDelta(self.num_rows, self.num_columns, *(tensor.to(device) for tensor in self.tensors))


def from_csr(indptr: Tensor, cols: Tensor, values: Tensor) -> JaggedDelta:
    """From CSR on the host: indptr int32 [N+1], cols int32 [nnz], values [nnz]. The order inside a row is kept.

    Raises OutOfRange for a column of 65,536 or more, and for more entries than an index holds (67 million).
    """
    num_columns = int(cols.max()) + 1 if cols.numel() else 0
    if num_columns > MAX_COLUMNS:
        raise OutOfRange(f"column {num_columns - 1}: jagged diagonals hold 16-bit columns, below {MAX_COLUMNS}")
    num_rows = indptr.numel() - 1
    windows = -(-num_rows // WINDOW)
    counts = torch.zeros(windows * WINDOW, dtype=torch.int64)
    counts[:num_rows] = indptr.long().diff()
    row_of_lane = counts.view(windows, WINDOW).argsort(dim=1, descending=True, stable=True)
    lane_of_row = torch.empty_like(row_of_lane)
    lane_of_row.scatter_(1, row_of_lane, torch.arange(WINDOW).expand(windows, WINDOW))
    window_first = torch.zeros(windows + 1, dtype=torch.int64)
    window_first[1:] = counts.view(windows, WINDOW).amax(dim=1).cumsum(0)
    row = torch.repeat_interleave(torch.arange(windows * WINDOW), counts)
    step = torch.arange(row.numel()) - indptr.long()[row]
    diagonal = window_first[row // WINDOW] + step
    lengths = torch.bincount(diagonal, minlength=int(window_first[-1]))
    padded = (lengths + PAD - 1) // PAD * PAD
    starts = padded.cumsum(0) - padded
    entries = int(padded.sum())
    if entries > MAX_ENTRIES:
        raise OutOfRange(f"{entries} entries with padding; jagged diagonals hold at most {MAX_ENTRIES}")
    place = starts[diagonal] + lane_of_row.flatten()[row]
    packed_cols = torch.zeros(entries, dtype=torch.int16)
    packed_cols[place] = cols.to(torch.int16)  # the low 16 bits
    packed_values = torch.zeros(entries, dtype=values.dtype)
    packed_values[place] = values
    return JaggedDelta(
        num_rows=num_rows,
        num_columns=num_columns,
        cols=packed_cols,
        values=packed_values,
        diagonals=(starts // PAD * 256 + lengths).to(torch.int32),
        window_first=window_first.to(torch.int32),
        lane_of_row=lane_of_row.flatten().to(torch.int16),
    )


def to_csr(delta: JaggedDelta) -> tuple[Tensor, Tensor, Tensor]:
    """The CSR that ``from_csr`` was given, bit for bit: (indptr, cols, values)."""
    windows = delta.window_first.numel() - 1
    row_of_lane = delta.lane_of_row.view(windows, WINDOW).argsort(dim=1)
    lengths, starts = delta.diagonals.long() % 256, delta.diagonals.long() // 256 * PAD
    diagonal = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    lane = torch.arange(diagonal.numel()) - (lengths.cumsum(0) - lengths)[diagonal]
    window = torch.searchsorted(delta.window_first.long(), diagonal, right=True) - 1
    row = window * WINDOW + row_of_lane[window, lane]
    order = row.argsort(stable=True)  # diagonals rise with the position inside a row, so ties are in order
    place = (starts[diagonal] + lane)[order]
    indptr = torch.zeros(delta.num_rows + 1, dtype=torch.int32)
    indptr[1:] = torch.bincount(row, minlength=delta.num_rows).cumsum(0)
    return indptr, delta.cols[place].to(torch.int32) & 0xFFFF, delta.values[place]
