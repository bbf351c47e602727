"""Which tokens a sequence has seen, dense over the vocabulary; kept only for sequences with penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaserve.core import SamplingParams
from deltaserve_kernels import upload


class TokenCounts:
    """``completion`` float32 [vocab]: times sampled. ``seen`` bool [vocab]: in prompt or completion."""

    def __init__(self, vocab_size: int, prompt_ids: Sequence[int], completion_ids: Sequence[int], device: torch.device):
        self.completion = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.seen.index_fill_(0, upload(torch.tensor(prompt_ids, dtype=torch.int64), device), True)
        for token_id in completion_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        self.completion[token_id] += 1.0
        self.seen[token_id] = True


def penalize(rows: Tensor, counts: Sequence[TokenCounts], sampling: Sequence[SamplingParams]) -> Tensor:
    """New rows of logits [n, vocab]; row i by ``counts[i]`` and ``sampling[i]``.

    Repetition (CTRL, Keskar et al. 2019) divides positive logits of seen tokens and multiplies negative ones; presence
    and frequency are OpenAI's, over sampled tokens. Neutral values leave a row bit for bit as it was.
    """

    def column(values: list[float]) -> Tensor:
        return upload(torch.tensor(values, dtype=rows.dtype), rows.device)[:, None]

    if any(s.repetition_penalty != 1.0 for s in sampling):
        penalty = column([s.repetition_penalty for s in sampling])
        seen = _stacked([count.seen for count in counts], rows.shape[1])
        rows = torch.where(seen, torch.where(rows > 0, rows / penalty, rows * penalty), rows)
    if any(s.presence_penalty or s.frequency_penalty for s in sampling):
        sampled = _stacked([count.completion for count in counts], rows.shape[1])
        rows = rows - column([s.frequency_penalty for s in sampling]) * sampled
        rows -= column([s.presence_penalty for s in sampling]) * (sampled > 0)
    return rows


def _stacked(columns: Sequence[Tensor], width: int) -> Tensor:
    """[n, width]: a step may be wider than a sequence's own vocabulary, where others have more tokens."""
    return torch.stack(
        [column if len(column) == width else pad(column, (0, width - len(column))) for column in columns]
    )
