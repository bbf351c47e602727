"""What an adapter puts before a sequence's own tokens, in the dtype of the file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KeyValuePrefix:
    """K and V of p positions as attention caches them: no norm, no rotary is applied to them any more.

    ``flat`` [p, num_layers * 2 * kv_heads * head_dim]: per position and layer first K, then V, head after head.
    """

    flat: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.flat.shape[0])


@dataclass(frozen=True, slots=True)
class PromptPrefix:
    """Input embeddings of p virtual tokens: ``embeddings`` [p, hidden_size].

    With ``task_cols`` [p, r] and ``task_rows`` [r, hidden_size] they are multiplied, entry by entry, by these' product.
    """

    embeddings: Tensor
    task_cols: Tensor | None = None
    task_rows: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.embeddings.shape[0])


PrefixDelta = KeyValuePrefix | PromptPrefix
