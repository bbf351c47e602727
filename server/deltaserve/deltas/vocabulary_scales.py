"""Embedding and head as linears of the base, for the vectors that an adapter has for them: magnitudes and biases.

The head is a linear to logits, ``[vocab, width]``; the embedding one from token ids, ``[width, vocab]``: DoRA's
magnitudes are one for each token there and one for each number of a row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.deltas.vocabulary import ROWS_AT_ONCE, TokenRows, matrix_size

if TYPE_CHECKING:
    from deltaserve.deltas.vectors import BaseWeights, LinearWeights
    from deltaserve_store.spec import BaseSpec


@dataclass(frozen=True)
class EmbeddingWeights:
    """The embedding as a linear from token ids, ``[width, num_tokens]``: ``rows(i, j)`` are columns of its matrix."""

    base: TokenRows
    name: str
    num_tokens: int

    @property
    def bias(self) -> Tensor | None:
        return None

    def rows(self, i: int, j: int) -> Tensor:
        pieces = [
            self.base.token_rows(self.name, torch.arange(t, min(t + ROWS_AT_ONCE, self.num_tokens)))[:, i:j].float()
            for t in range(0, self.num_tokens, ROWS_AT_ONCE)
        ]
        return torch.cat(pieces).t()


def weights_of(base: BaseWeights, spec: BaseSpec, name: str) -> LinearWeights:
    """The weight and bias behind a linear, the head or the embedding; raises KeyError."""
    if spec.embedding is not None and name == spec.embedding.name:
        return EmbeddingWeights(base, name, matrix_size(spec, name)[0])
    return base.linear(name)
