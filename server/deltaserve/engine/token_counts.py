"""Which tokens a sequence has seen, dense over the vocabulary; kept only for sequences with penalties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenCounts:
    """``completion`` float32 [vocab]: times sampled. ``seen`` bool [vocab]: in prompt or completion."""

    def __init__(self, vocab_size: int, prompt_ids: Sequence[int], completion_ids: Sequence[int], device: torch.device):
        self.completion = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.seen[torch.tensor(prompt_ids, dtype=torch.int64, device=device)] = True
        for token_id in completion_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        self.completion[token_id] += 1.0
        self.seen[token_id] = True

    def penalize(self, row: Tensor, *, repetition: float, presence: float, frequency: float) -> Tensor:
        """A new row of logits [vocab]. Repetition as in the CTRL paper: divides positive logits of seen tokens,
        multiplies negative ones; presence and frequency as OpenAI defines them, over sampled tokens."""
        if repetition != 1.0:
            row = torch.where(self.seen, torch.where(row > 0, row / repetition, row * repetition), row)
        if presence or frequency:
            row = row - frequency * self.completion - presence * (self.completion > 0)
        return row
