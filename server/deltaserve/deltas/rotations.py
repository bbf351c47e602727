"""Fold rotations of a linear's input or output, and what they make of the base's weight by their method's own formula.

A rotation is kept as its difference from the identity, ``x + s x (R - I)`` at strength s: the weight then changes by
``s`` times its own change, as under every other term. Where a method also scales the outputs (BOFT) both sides carry
the strength, and its square comes in; requests take such adapters at 0 and 1 alone (``deltas.composition``), and only
the proof looks in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.deltas.rotation_terms import RotationTerm
from deltaserve.errors import Reason
from deltaserve_kernels import RotationFactor
from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.rotation_deltas import RotationDelta
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import VectorDelta

if TYPE_CHECKING:
    from deltaserve.deltas.vectors import BaseWeights


def rotation_of(parsed: ParsedAdapter, linear: str) -> RotationDelta | None:
    """The rotation of a linear, if it has one."""
    found = (d for d in parsed.deltas if isinstance(d, RotationDelta) and d.module == linear)
    return next(found, None)


def fold_rotations(
    parsed: ParsedAdapter, spec: BaseSpec, dtype: torch.dtype, reasons: list[Reason]
) -> dict[str, RotationTerm]:
    """Terms by linear, blocks cast to ``dtype``. What does not fit is added to ``reasons``."""
    terms: dict[str, RotationTerm] = {}
    biases: set[str] = set()
    others: set[str] = set()
    for delta in parsed.deltas:
        if isinstance(delta, VectorDelta) and delta.is_new_bias_alone:
            biases.add(delta.module)
        elif not isinstance(delta, RotationDelta | BottleneckDelta):
            others.add(delta.module)
    for delta in parsed.deltas:
        if not isinstance(delta, RotationDelta):
            continue
        if delta.module not in spec.linears:
            reasons.append(Reason("unknown_module", delta.module, "a rotation", "a linear of the base"))
        elif delta.module in (terms.keys() | others) or (delta.module in biases and delta.side == "output"):
            # What the method's formula would mean beside another delta is not defined.
            reasons.append(Reason("duplicate_module", delta.module, "two deltas", "a rotation alone on its linear"))
        else:
            linear = spec.linears[delta.module]
            width = linear.in_features if delta.side == "input" else linear.out_features
            factors = [RotationFactor(changes.to(dtype).contiguous(), order) for changes, order in delta.factors]
            terms[delta.module] = RotationTerm(delta.side, tuple(factors))
            reasons.extend(_misfits(delta, factors, width))
    return terms


def _misfits(delta: RotationDelta, factors: list[RotationFactor], width: int) -> list[Reason]:
    reasons = []
    for factor in factors:
        size = factor.blocks.shape[-1]
        if width % size or factor.width not in (0, width) or factor.blocks.shape[0] not in (1, width // size):
            found = f"blocks {list(factor.blocks.shape)}"
            reasons.append(Reason("shape_mismatch", delta.module, found, f"blocks that cut its {width} {delta.side}s"))
        if not bool(torch.isfinite(factor.blocks).all()):
            allowed = f"magnitudes up to {torch.finfo(factor.blocks.dtype).max:g}"
            found = "a rotation that overflows the serving dtype"
            reasons.append(Reason("value_out_of_range", delta.module, found, allowed))
    return reasons


# ---- The oracle: the method's own formula, independently of the factors ----


def dense_rotation(delta: RotationDelta, weight: Tensor, strength: float) -> Tensor:
    """fp32 [out, in]: what the rotation, and the scale that comes with it, change of a weight at ``strength``."""
    changed = weight + strength * (delta.turn(weight) - weight)
    if delta.out_scale is not None:
        changed = (1 + strength * (delta.out_scale.float().flatten()[:, None] - 1)) * changed
    return changed - weight


def rotation_biases(parsed: ParsedAdapter, base: BaseWeights) -> Mapping[str, Callable[[], Tensor]]:
    """Differences of the base's biases [out] by linear, where the output is turned, at strength 1."""
    return {
        delta.module: partial(_turned_bias, delta, bias)
        for delta in parsed.deltas
        if isinstance(delta, RotationDelta)
        and delta.side == "output"
        and (bias := base.linear(delta.module).bias) is not None
    }


def _turned_bias(delta: RotationDelta, bias: Tensor) -> Tensor:
    stored = bias.float().cpu()
    return delta.turn(stored[:, None])[:, 0] - stored
