"""Documents to rows of tokens: whole documents packed into rows, padding where nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

import torch

from deltaserve.tinybase.corpus import Document, Split, documents

SHORT_ROW = 256
LONG_ROW = 1024
IGNORED = -100
Encode = Callable[[Document], list[int]]


def pack(pieces: list[list[int]], row_length: int, rng: Random) -> list[list[int]]:
    """First fit, longest first; documents of a row in random order. Pieces longer than a row are not accepted."""
    rows: list[list[list[int]]] = []
    room: list[int] = []
    open_rows: list[int] = []
    for piece in sorted(pieces, key=len, reverse=True):
        if len(piece) > row_length:
            raise ValueError(f"a document of {len(piece)} tokens does not fit a row of {row_length}")
        place = next((index for index in open_rows if room[index] >= len(piece)), None)
        if place is None:
            rows.append([])
            room.append(row_length)
            open_rows.append(len(rows) - 1)
            place = len(rows) - 1
        rows[place].append(piece)
        room[place] -= len(piece)
        if room[place] < 8:
            open_rows.remove(place)
    packed: list[list[int]] = []
    for row in rows:
        order = sorted(row, key=lambda _: rng.random())
        packed.append([token for piece in order for token in piece])
    return sorted(packed, key=lambda _: rng.random())


def as_tensors(rows: list[list[int]], row_length: int, pad: int, bos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), both int64 [rows, row_length]. Padding and the start of a next document are not targets."""
    tokens = torch.full((len(rows), row_length + 1), pad, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    targets = tokens[:, 1:].clone()
    targets[(targets == pad) | (targets == bos)] = IGNORED
    return tokens[:, :-1].contiguous(), targets.contiguous()


def batches(
    encode: Encode, seed: int, split: Split, *, tokens: int, pad: int, bos: int, chunk: int = 3000
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of about `tokens` tokens: mostly short rows, one in ten of long rows for longer contexts."""
    rng = Random(seed)
    stream = documents(seed, split)
    while True:
        short: list[list[int]] = []
        long: list[list[int]] = []
        for document in islice(stream, chunk):
            piece = encode(document)[:LONG_ROW]
            (long if len(piece) > SHORT_ROW or rng.random() < 0.06 else short).append(piece)
        ready: list[tuple[torch.Tensor, torch.Tensor]] = []
        for pieces, length in ((short, SHORT_ROW), (long, LONG_ROW)):
            rows = pack(pieces, length, rng)
            per_batch = max(1, tokens // length)
            for start in range(0, len(rows) - per_batch + 1, per_batch):
                ready.append(as_tensors(rows[start : start + per_batch], length, pad, bos))
        yield from sorted(ready, key=lambda _: rng.random())
