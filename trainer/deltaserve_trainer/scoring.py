"""Scores from logits that somebody else computed: the engine's, or a fine-tuned model's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaserve_trainer.data import read_dataset
from deltaserve_trainer.encoding import EncodedExample, Encoder
from deltaserve_trainer.errors import DataInvalid
from deltaserve_trainer.report import encode_all


def read_rows(data: Path, base_folder: Path, *, max_rows: int, max_length: int) -> list[EncodedExample]:
    """The first ``max_rows`` rows of a JSONL file that carry loss, encoded. Raises ``DataInvalid``."""
    encoder = Encoder.from_folder(base_folder, max_length)
    rows, _ = encode_all(encoder, read_dataset(data).examples[:max_rows])
    if not rows:
        raise DataInvalid(data.name, [f"no row has a trained token within {max_length} tokens"], 1)
    return rows


def loss_of(logits: Sequence[Tensor], rows: Sequence[EncodedExample]) -> float:
    """Mean nats per trained token; ``logits`` [num_tokens, vocab] for each row."""
    total, count = 0.0, 0
    for scores, row in zip(logits, rows, strict=True):
        targets = torch.tensor(row.input_ids[1:])
        is_trained = torch.tensor(row.trained[1:])
        total += float(F.cross_entropy(scores[:-1][is_trained].float(), targets[is_trained], reduction="sum"))
        count += int(is_trained.sum())
    return total / count


@torch.no_grad()
def model_logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of every position, float32 [num_tokens, vocab], by a plain transformers model."""
    model.eval()
    return [model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float() for ids in prompts]


def divergence(meant: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Mean over all positions of KL(meant || found), nats: how far the answers are from those that were meant."""
    total, count = 0.0, 0
    for one, other in zip(meant, found, strict=True):
        log_p, log_q = one.double().log_softmax(-1), other.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(one)
    return total / count
