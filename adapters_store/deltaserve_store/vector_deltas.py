"""Vectors that an adapter's files hold for a linear or a norm, in the dtype of the file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class VectorDelta:
    """``y = out_scale * W (in_scale * x) + W in_bias + b + bias``; any of them may be missing.

    ``out_scale`` and ``bias`` [out], ``in_scale`` and ``in_bias`` [in]. ``scales_bias``: ``out_scale`` multiplies the
    base's bias too; ``bias_scale`` [out] multiplies it in its place. ``new_bias`` [out] stands in place of the base's
    bias.
    """

    module: str
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None
    bias: Tensor | None = None
    new_bias: Tensor | None = None
    scales_bias: bool = False
    in_bias: Tensor | None = None
    bias_scale: Tensor | None = None

    @property
    def is_two_sided(self) -> bool:
        """Whether both sides are scaled: its change of the weight is then not linear in the strength."""
        return self.out_scale is not None and self.in_scale is not None

    @property
    def is_new_bias_alone(self) -> bool:
        """Whether it leaves the weight as it is, and no more than replaces the bias."""
        others = (self.out_scale, self.in_scale, self.bias, self.in_bias, self.bias_scale)
        return self.new_bias is not None and all(vector is None for vector in others)


@dataclass(frozen=True, slots=True)
class NormDelta:
    """A norm's weight (``gain``) and bias (``shift``), [H] each or None.

    ``replaces``: they stand in place of the base's; else they are added to them.
    """

    module: str
    gain: Tensor | None = None
    shift: Tensor | None = None
    replaces: bool = False
