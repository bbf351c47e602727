"""Next-token cross entropy over the tokens that carry loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaserve_trainer.batches import IGNORED, TokenBatch, collate
from deltaserve_trainer.encoding import EncodedExample


def summed_loss(model: nn.Module, batch: TokenBatch, precision: str) -> Tensor:
    """Sum over the trained tokens of -log p(token | what precedes it), nats, float32 scalar with a graph."""
    device = next(model.parameters()).device
    with _autocast(device.type, precision):
        logits = model(input_ids=batch.input_ids.to(device), use_cache=False).logits
    labels = batch.labels[:, 1:].to(device)
    is_trained = labels != IGNORED
    return F.cross_entropy(logits[:, :-1][is_trained].float(), labels[is_trained], reduction="sum")


@torch.no_grad()
def mean_loss(
    model: nn.Module, rows: Sequence[EncodedExample], *, batch_size: int, pad_token_id: int, precision: str
) -> float:
    """Mean nats per trained token over ``rows``; shortest rows first, so that padding is small."""
    was_training = model.training
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    total, count = 0.0, 0
    try:
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size], pad_token_id)
            total += float(summed_loss(model, batch, precision))
            count += batch.num_trained
    finally:
        model.train(was_training)
    return total / count


@contextmanager
def _autocast(device_type: str, precision: str) -> Iterator[None]:
    if precision == "float32":
        yield
        return
    with torch.autocast(device_type, dtype=torch.bfloat16):
        yield
