"""Prefixes on their way into the blocks of sequences that start: copied, or computed by the model.

Virtual tokens that other adapters of the request have a part in are run through the model before the step, as rows of
the sequence without ids: at their positions, with its parts, reading what stands before them in its blocks. Sequences
that start in one step share these passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve.engine.batch import PrefixPart, ScheduledSequence
from deltaserve_kernels import BLOCK_SIZE, PrefixTables

MAX_ROWS = 256
"""Most virtual tokens of one pass, as prompts come in chunks."""


class VirtualRows(NamedTuple):
    """A pass: ``batch`` has a place for each token, ``embeddings`` [rows, hidden] are what goes there."""

    batch: list[ScheduledSequence]
    embeddings: Tensor


class _Piece(NamedTuple):
    seq: ScheduledSequence
    part: PrefixPart
    start: int
    stop: int


def copy_prefixes(batch: Sequence[ScheduledSequence], tables: PrefixTables, pool: Tensor) -> None:
    """What the adapters have ready, in the order of the parts: a later one may begin in an earlier one's last block."""
    for seq in batch:
        if seq.prefix is None:
            continue
        parts, first, regime = seq.prefix
        for part in parts:
            if not part.is_run:
                tables.copy(part.slot, pool, seq.block_table, first, regime, part.start)


def passes(batch: Sequence[ScheduledSequence], tables: PrefixTables) -> Iterator[VirtualRows]:
    """What the model computes once the copies are there, pass after pass; each sequence's rows in order."""
    left = [pieces for seq in batch if (pieces := _pieces(seq))]
    while left:
        taken: list[_Piece] = []
        num_rows = 0
        for pieces in left:
            size = pieces[0].stop - pieces[0].start
            if not taken or num_rows + size <= MAX_ROWS:
                taken.append(pieces.pop(0))
                num_rows += size
        left = [pieces for pieces in left if pieces]
        yield VirtualRows([_scheduled(piece) for piece in taken], torch.cat([_rows(piece, tables) for piece in taken]))


def _pieces(seq: ScheduledSequence) -> list[_Piece]:
    if seq.prefix is None:
        return []
    begin = seq.prefix.first_block * BLOCK_SIZE
    return [
        _Piece(seq, part, start, min(start + MAX_ROWS, part.stop))
        for part in seq.prefix.parts
        if part.is_run
        for start in range(max(begin, part.start), part.stop, MAX_ROWS)
    ]


def _scheduled(piece: _Piece) -> ScheduledSequence:
    seq = piece.seq
    return ScheduledSequence(
        seq_id=seq.seq_id,
        token_ids=(0,) * (piece.stop - piece.start),
        start=piece.start,
        block_table=seq.block_table,
        parts=seq.parts,
        logits="none",
        length=max(seq.length, seq.stop),
    )


def _rows(piece: _Piece, tables: PrefixTables) -> Tensor:
    embeddings = tables.embeddings(piece.part.slot)
    if embeddings is None:
        raise ValueError(f"slot {piece.part.slot} holds given keys and values; only embeddings can be run")
    return embeddings[piece.start - piece.part.start : piece.stop - piece.part.start]
