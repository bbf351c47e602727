"""Differences of whole weights that an adapter's files hold, in full or packed to one bit a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32
"""Packed bits lie in int32 words: column k of a row is bit ``k % 32`` of word ``k // 32``; bits past the last are 0."""


@dataclass(frozen=True, slots=True)
class DenseDelta:
    """``W + delta``: ``delta [out, in]`` in the dtype of the file, also where the base stores W transposed."""

    module: str
    delta: Tensor


@dataclass(frozen=True, slots=True)
class WholeDelta:
    """``weight [out, in]`` in place of W, in the dtype of the file, also where the base stores W transposed."""

    module: str
    weight: Tensor


@dataclass(frozen=True, slots=True)
class MaskDelta:
    """``W`` with the marked weights taken out (set to 0): ``mask`` int32 ``[out, ceil(in / 32)]``, a set bit marks."""

    module: str
    mask: Tensor


@dataclass(frozen=True, slots=True)
class SignDelta:
    """``W + scale * sign``: ``signs`` int32 ``[out, ceil(in / 32)]``, a set bit is +1, one not set -1; ``scale`` [1],
    or [out] with one for each output."""

    module: str
    signs: Tensor
    scale: Tensor

    def dense(self, in_features: int) -> Tensor:
        """float32 [out, in]."""
        each = (self.signs[:, :, None] >> torch.arange(WORD_BITS, dtype=torch.int32)) & 1
        signs = each.reshape(len(self.signs), -1)[:, :in_features]
        return torch.where(signs == 1, 1.0, -1.0) * self.scale.float()[:, None]
