"""Windowed jagged diagonals: a sparse delta laid out so that a kernel reads it in wide, aligned pieces.

Output rows go in windows of 128. A row's nonzeros are cut into *packs* of four, in order. Inside a window rows are
sorted by their number of packs, most first; a row's place is its *lane*. *Diagonal* j of a window holds the j-th pack
of every row that has one: lanes 0 to its length, without a gap, since shorter rows come later. So a thread that owns a
lane reads whole packs of its own row, and no sum crosses threads. A row's last pack is filled up with its last column
and zeros: what the row does not read anyway is not read for it.

About 4.4 bytes a nonzero in 16 bits where rows have some twenty: a value, a 16-bit column, and little else. Plain
torch; no GPU, no triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve_kernels.errors import OutOfRange

WINDOW = 128
PACK = 4
MAX_COLUMNS = 1 << 16
MAX_ENTRIES = PACK << 23  # a diagonal's first pack has 23 bits of an int32; its length has 8


@dataclass(frozen=True)
class JaggedDelta:
    """One sparse delta of ``num_rows`` output features.

    cols:         int16 [E]    columns, the bits of an unsigned number; padding repeats a row's last
    values:       float [E]    padding is 0
    diagonals:    int32 [D]    (first entry / 4) * 256 + length in lanes
    window_first: int32 [W+1]  window w has diagonals ``window_first[w]:window_first[w+1]``
    lane_of_row:  int16 [W * 128]  lane of each row of a window, rows past ``num_rows`` too, plus 256 times the number
                  of entries that fill up its last pack
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
        tensors = (tensor.to(device) for tensor in self.tensors)
        return JaggedDelta(self.num_rows, self.num_columns, *tensors)


def from_csr(indptr: Tensor, cols: Tensor, values: Tensor) -> JaggedDelta:
    """From CSR on the host: indptr int32 [N+1], cols int32 [nnz], values [nnz].

    The order inside a row is kept. Raises OutOfRange for a column of 65,536 or more, and for more entries than an index
    holds (67 million).
    """
    num_columns = int(cols.max()) + 1 if cols.numel() else 0
    if num_columns > MAX_COLUMNS:
        raise OutOfRange(f"column {num_columns - 1}: 16 bits hold {MAX_COLUMNS}")
    num_rows = indptr.numel() - 1
    windows = -(-num_rows // WINDOW)
    counts = torch.zeros(windows * WINDOW, dtype=torch.int64)
    counts[:num_rows] = indptr.long().diff()
    packs = (counts + PACK - 1) // PACK
    row_of_lane = packs.view(windows, WINDOW).argsort(dim=1, descending=True, stable=True)
    lane_of_row = torch.empty_like(row_of_lane)
    lane_of_row.scatter_(1, row_of_lane, torch.arange(WINDOW).expand(windows, WINDOW))
    lane_of_row = lane_of_row.flatten()
    window_first = torch.zeros(windows + 1, dtype=torch.int64)
    window_first[1:] = packs.view(windows, WINDOW).amax(dim=1).cumsum(0)
    # One number a pack: its row, and which of the row's packs it is.
    owner = torch.repeat_interleave(torch.arange(windows * WINDOW), packs)
    ordinal = torch.arange(owner.numel()) - (packs.cumsum(0) - packs)[owner]
    lengths = torch.bincount(window_first[owner // WINDOW] + ordinal, minlength=int(window_first[-1]))
    starts = lengths.cumsum(0) - lengths
    entries = owner.numel() * PACK
    if entries > MAX_ENTRIES:
        raise OutOfRange(f"{entries} entries with padding; jagged diagonals hold at most {MAX_ENTRIES}")
    place = (starts[window_first[owner // WINDOW] + ordinal] + lane_of_row[owner]) * PACK
    # Where in its row each entry of each pack lies; what fills up a row's last pack repeats its last column.
    step = ordinal[:, None] * PACK + torch.arange(PACK)
    is_padding = step >= counts[owner, None]
    source = (counts.cumsum(0) - counts)[owner, None] + step.minimum(counts[owner, None] - 1)
    target = place[:, None] + torch.arange(PACK)
    packed_cols = torch.zeros(entries, dtype=torch.int16)
    packed_cols[target] = cols.to(torch.int16)[source]  # the low 16 bits
    packed_values = torch.zeros(entries, dtype=values.dtype)
    packed_values[target] = values[source].masked_fill(is_padding, 0)
    padding = packs * PACK - counts
    return JaggedDelta(
        num_rows=num_rows,
        num_columns=num_columns,
        cols=packed_cols,
        values=packed_values,
        diagonals=(starts * 256 + lengths).to(torch.int32),
        window_first=window_first.to(torch.int32),
        lane_of_row=(lane_of_row + 256 * padding).to(torch.int16),
    )


def to_csr(delta: JaggedDelta) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr, cols, values) as ``from_csr`` was given them, bit for bit."""
    windows = delta.window_first.numel() - 1
    words = delta.lane_of_row.long().view(windows, WINDOW)
    row_of_lane = (words % 256).argsort(dim=1)
    lengths, starts = delta.diagonals.long() % 256, delta.diagonals.long() // 256
    diagonal = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    lane = torch.arange(diagonal.numel()) - (lengths.cumsum(0) - lengths)[diagonal]
    window = torch.searchsorted(delta.window_first.long(), diagonal, right=True) - 1
    row = window * WINDOW + row_of_lane[window, lane]
    # Diagonals rise with the position inside a row, so ties are in order.
    order = row.argsort(stable=True)
    row = row[order]
    is_last = torch.ones(row.numel(), dtype=torch.bool)
    is_last[:-1] = row[1:] != row[:-1]
    kept = PACK - torch.where(is_last, (words // 256).flatten()[row], 0)
    place = ((starts[diagonal] + lane)[order, None] * PACK + torch.arange(PACK))[torch.arange(PACK) < kept[:, None]]
    indptr = torch.zeros(delta.num_rows + 1, dtype=torch.int32)
    indptr[1:] = torch.zeros(delta.num_rows, dtype=torch.int64).index_add_(0, row, kept).cumsum(0)
    return indptr, delta.cols[place].to(torch.int32) & 0xFFFF, delta.values[place]
