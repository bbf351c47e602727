"""A residual module that an adapter's files hold for an attach point of the base, in the dtype of the file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "identity")
"""``gelu`` is the exact one, ``gelu_tanh`` its usual approximation."""


@dataclass(frozen=True, slots=True)
class BottleneckDelta:
    """``h + scale * (up phi(down h + down_bias) + up_bias)`` at the attach point ``point``.

    ``down [r, H]``, ``up [H, r]``, ``down_bias [r]`` and ``up_bias [H]`` or None. ``is_parallel``: the module is fed
    what the sublayer is fed, and its result is added to what the sublayer gives; else it is fed the ``h`` it changes.
    """

    point: str
    down: Tensor
    up: Tensor
    activation: str
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    is_parallel: bool = False
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])
