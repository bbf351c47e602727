"""The frozen base model as the rest of deltaserve sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.model.context import ForwardContext
from deltaserve.model.kv_cache import KVLayout

if TYPE_CHECKING:
    from deltaserve_store.spec import BaseSpec


class BaseModel:
    """A loaded base. ``linears[i]`` is the name of the linear that tables call i; ``lm_head`` is not among them."""

    spec: BaseSpec
    linears: tuple[str, ...]
    kv_layout: KVLayout
    max_context: int
    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]

    def kv_regime(self, length: int) -> int:
        """Which rope frequencies a sequence of ``length`` tokens uses; 0 for all lengths of most bases.

        K of one regime cannot be read under another: when a growing sequence changes its regime its blocks must be
        computed again, and the regime belongs into a prefix cache's key.
        """
        raise NotImplementedError

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """``input_ids`` int64 [T] of a step -> final hidden rows [T, hidden] in the serving dtype; writes K and V."""
        raise NotImplementedError

    def logits(self, hidden_rows: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden rows [R, hidden] -> float32 [R, vocab], through the model's own head (soft-capping, scaling)."""
        raise NotImplementedError

    def folded_logits(self, ids: Tensor, deltas: Mapping[str, Callable[[], Tensor]]) -> Tensor:
        """The proof's half: ids [T <= 64] -> float32 [T, vocab] with every linear at ``W + dW`` in fp32."""
        raise NotImplementedError


def load_base(
    path: Path, *, dtype: torch.dtype, device: torch.device | str, load_format: str = "auto", allow_hub: bool = False
) -> BaseModel:
    """Load a base from a local folder; raises ``UnsupportedBase`` naming the component that cannot be served."""
    raise NotImplementedError
