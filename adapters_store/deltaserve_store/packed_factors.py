"""Low-rank factors of few bits a number, as an adapter's files hold them (Delta-CoMe, arXiv:2406.08903).

Directions (a row of ``a`` [rank, in], a column of ``b`` [out, rank]) that are kept with the same bits form a *band*. A
direction's numbers lie along its long side, ``in`` or ``out`` of them; each *span* of that many numbers, beginning with
the first, has one scale. A number is ``scale * (code - (2**bits - 1) / 2)``, its code an integer from 0 to ``2**bits -
1``; so there are as many values above 0 as below, and none at 0, which two or three bits could not afford.

Codes of a row lie one after another, the lowest bit first: bit ``i`` of the row is bit ``i % 8`` of its byte ``i //
8``, and number j has the bits from ``j * bits`` on. Each row begins with a byte of its own; bits past the last number
are 0. Bands follow each other from the most bits to the fewest, in a band all rows of ``a``, then all columns of ``b``
as rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

BITS = (8, 4, 3, 2)
SPANS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class PackedFactors:
    """``W + b @ a``: ``shape`` is that of W, ``ranks`` the number of directions by bits. ``codes`` uint8 and ``scales``
    (float16, bfloat16 or float32) are one-dimensional, with the layout that is told above."""

    module: str
    shape: tuple[int, int]
    ranks: Mapping[int, int]
    span: int
    codes: Tensor
    scales: Tensor

    @property
    def rank(self) -> int:
        return sum(self.ranks.values())

    def factors(self) -> tuple[Tensor, Tensor]:
        """``a`` [rank, in] and ``b`` [out, rank], float32; directions in the order of the file."""
        sides: tuple[list[Tensor], list[Tensor]] = [], []
        for side, bits, codes, scales in self._rows():
            levels = unpack_rows(codes, self._width(side), bits).float() - (2**bits - 1) / 2
            wide = scales.float().repeat_interleave(self.span, dim=1)[:, : levels.shape[1]]
            sides[side].append(levels * wide)
        return torch.cat(sides[0]), torch.cat(sides[1]).t().contiguous()

    def dense(self) -> Tensor:
        """The same delta, float32 [out, in], by the definition of a number: its code is cut out of the two bytes that
        it may lie in. Nothing is shared with ``factors``, which is proven against this."""
        total = torch.zeros(self.shape)
        sides: dict[int, Tensor] = {}
        for side, bits, codes, scales in self._rows():
            start = torch.arange(self._width(side)) * bits
            last = codes.shape[1] - 1
            pairs = codes[:, start // 8].int() + 256 * codes[:, (start // 8 + 1).clamp(max=last)].int()
            numbers = (pairs >> (start % 8)) % 2**bits
            half_steps = 2 * numbers - (2**bits - 1)
            sides[side] = half_steps * (scales.float()[:, torch.arange(len(start)) // self.span] / 2)
            if side == 1:
                total += sides[1].t() @ sides[0]
        return total

    def spills(self) -> bool:
        """Whether a bit past the last number of some row is set."""
        for side, bits, codes, _ in self._rows():
            used = self._width(side) * bits % 8
            if used and bool((codes[:, -1] >> used).any()):
                return True
        return False

    def _width(self, side: int) -> int:
        """Numbers of a direction on side 0, of ``a``, or 1, of ``b``."""
        return self.shape[1 - side]

    def _rows(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(side, bits, codes [r, bytes], scales [r, spans]) of each band, in the order of the file."""
        places = list(_places(self.shape, self.ranks, self.span))
        for (side, bits, byte, scale), (_, _, next_byte, next_scale) in pairwise(places):
            rank = self.ranks[bits]
            yield side, bits, self.codes[byte:next_byte].view(rank, -1), self.scales[scale:next_scale].view(rank, -1)


def packed_sizes(shape: tuple[int, int], ranks: Mapping[int, int], span: int) -> tuple[int, int]:
    """How many codes (bytes) and scales such factors have."""
    *_, (_, _, num_codes, num_scales) = _places(shape, ranks, span)
    return num_codes, num_scales


def row_bytes(width: int, bits: int) -> int:
    return -(-width * bits // 8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 [r, bytes] of codes [r, width], uint8 below ``2**bits``."""
    rank, width = codes.shape
    taken = (codes[:, :, None] >> torch.arange(bits, dtype=torch.uint8)) & 1
    padded = torch.zeros(rank, row_bytes(width, bits) * 8, dtype=torch.uint8)
    padded[:, : width * bits] = taken.reshape(rank, -1)
    return (padded.view(rank, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_rows(packed: Tensor, width: int, bits: int) -> Tensor:
    """The codes that ``pack_rows`` packed, uint8 [r, width]."""
    each = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    each = each.reshape(len(packed), -1)[:, : width * bits].reshape(len(packed), width, bits)
    return (each << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def _places(shape: tuple[int, int], ranks: Mapping[int, int], span: int) -> Iterator[tuple[int, int, int, int]]:
    """(side, bits, first code, first scale) of each band's rows in the order of the file; then the ends of both."""
    byte = scale = 0
    for bits in sorted(ranks, reverse=True):
        for side in (0, 1):
            yield side, bits, byte, scale
            width = shape[1 - side]
            byte += ranks[bits] * row_bytes(width, bits)
            scale += ranks[bits] * -(-width // span)
    yield 0, 0, byte, scale
