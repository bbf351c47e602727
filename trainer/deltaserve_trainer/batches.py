"""Which rows form which training batch.

Rows are grouped by length instead of packed: packing several rows into one sequence needs attention that isolates
them (FlashAttention's variable length), which scaled-dot-product attention on a CPU does not offer, and rows that see
their neighbours learn something else than what is served. Grouping wastes a few per cent on padding and nothing else.

The plan is a pure function of (lengths, batch size, seed, epoch), so a resumed run continues with the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve_trainer.encoding import EncodedExample

_GROUP_BATCHES = 16  # rows of this many batches are sorted by length together
IGNORED = -100


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded rows. ``labels`` [B, T] hold the token itself where predicting it counts, else ``IGNORED``.

    Padding sits right of every real token, so causal attention keeps it out of every counted prediction and no
    attention mask is needed.
    """

    input_ids: Tensor
    labels: Tensor

    @property
    def num_trained(self) -> int:
        return int((self.labels[:, 1:] != IGNORED).sum())


def plan_epoch(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of each batch of one epoch; every row occurs once, the last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    group = batch_size * _GROUP_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), group):
        rows = sorted(order[start : start + group], key=lambda row: lengths[row])
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class BatchPlan:
    """The batch of each training step, counted from 0 over all epochs."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.steps_per_epoch = -(-len(lengths) // batch_size)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def rows(self, step: int) -> list[int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches = plan_epoch(self._lengths, self._batch_size, self._seed, epoch)
            self._epoch = epoch
        return self._batches[index]


def collate(rows: Sequence[EncodedExample], pad_token_id: int) -> TokenBatch:
    """One right-padded batch, int64 ``[B, T]`` on the CPU."""
    width = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.input_ids, dtype=torch.int64)
        input_ids[i, : len(ids)] = ids
        labels[i, : len(ids)] = torch.where(torch.tensor(row.trained), ids, IGNORED)
    return TokenBatch(input_ids, labels)
