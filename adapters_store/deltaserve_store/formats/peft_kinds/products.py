"""PEFT LoHa and LoKr: deltas that are products of small matrices, of higher rank than their files suggest.

LoHa (Hyeon-Woo et al., arXiv:2108.06098): ``alpha / r * (A1 B1) o (A2 B2)``, entry by entry. Its rank is ``r * r``: the
products of all pairs of columns, and of all pairs of rows. LoKr (Yeh et al., arXiv:2309.14859): ``alpha / r * kron(W1,
W2)``; with ``Wi = Ai Bi`` it is ``kron(A1, A2) kron(B1, B2)``, of rank ``rank(W1) * rank(W2)``. A factor that is saved
whole has the rank of its shorter side. Sources: peft 0.21, ``tuners/{loha,lokr}/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    ALPHA,
    ALPHA_PATTERN,
    COMMON_FIELDS,
    FLAG,
    FRACTION,
    RANK,
    RANK_PATTERN,
    SELECTION_FIELDS,
    SWITCH,
    FieldRule,
    is_int,
    one_of,
)
from deltaserve_store.formats.peft_kinds.low_rank import from_factors
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

_FIELDS = {
    **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
    **SELECTION_FIELDS,
    "r": RANK,
    "alpha": ALPHA,
    "rank_pattern": RANK_PATTERN,
    "alpha_pattern": ALPHA_PATTERN,
    "rank_dropout": FRACTION,
    "module_dropout": FRACTION,
    # It concerns convolutions, which a causal language model's linears are not.
    "use_effective_conv2d": FLAG,
}


class _Product(PeftReader):
    """Rank and scaling of both types: ``r`` and ``alpha`` of the module's own patterns."""

    def _own_rank(self, linear: LinearSpec) -> int:
        return int(self.patterns("rank_pattern").value_for(linear.name, self.config["r"]))

    def _scaling(self, linear: LinearSpec) -> float:
        return self.patterns("alpha_pattern").value_for(linear.name, self.config["alpha"]) / self._own_rank(linear)


class LoHa(_Product):
    peft_type = "LOHA"
    title = "LoHa"
    source = "`hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`"
    delta = "`alpha / r · (A1 B1) ∘ (A2 B2)`"
    term = "low rank, rank r² (at most min(in, out))"
    limits = "an error above the limit, where r² exceeds the bound"
    fields: ClassVar[Mapping[str, FieldRule]] = {**_FIELDS, "init_weights": FLAG}

    def bound(self, linear: LinearSpec) -> int:
        return self._own_rank(linear) ** 2

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = self._own_rank(linear)
        left, right = TensorRule((linear.out_features, rank)), TensorRule((rank, linear.in_features))
        return {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        a1, b1, a2, b2 = (parts[f"hada_w{name}"].float() for name in ("1_a", "1_b", "2_a", "2_b"))
        scaling = self._scaling(linear)

        def factors() -> tuple[Tensor, Tensor]:
            """All pairs of rows on the right, all pairs of columns on the left."""
            left = (a1[:, :, None] * a2[:, None, :]).reshape(linear.out_features, -1)
            return (b1[:, None, :] * b2[None, :, :]).reshape(-1, linear.in_features), left

        def dense() -> Tensor:
            return (a1 @ b1) * (a2 @ b2) * scaling

        return from_factors(linear, a1.shape[1] ** 2, factors, scaling, self.conversion, dense)


def split(size: int, factor: int) -> tuple[int, int]:
    """``(m, n)`` with ``m * n = size``: ``m = factor`` if it divides; else ``m <= n`` as near each other as ``m`` up to
    ``factor`` allows (-1: as near as any). LoKr's shapes hang on it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = size if factor == -1 else factor
    best = max((m for m in range(1, math.isqrt(size) + 1) if size % m == 0 and m <= largest), default=1)
    return best, size // best


class LoKr(_Product):
    peft_type = "LOKR"
    title = "LoKr"
    source = "`lokr_w1` or `lokr_w1_a`, `lokr_w1_b`; `lokr_w2` or `lokr_w2_a`, `lokr_w2_b`"
    delta = "`alpha / r · kron(W1, W2)`"
    term = "low rank, rank(W1) · rank(W2) (at most min(in, out))"
    limits = "an error above the limit, where the ranks multiply to more than the bound"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **_FIELDS,
        "decompose_both": SWITCH,
        "decompose_factor": FieldRule(
            "understood",
            lambda value: is_int(value) and (value == -1 or 1 <= value <= 1 << 20),
            "-1 or a positive integer",
        ),
        "rank_dropout_scale": FLAG,
        "init_weights": FieldRule("descriptive", one_of(True, False, "lycoris"), "true, false or lycoris"),
    }

    def _shapes(self, linear: LinearSpec) -> tuple[tuple[int, int], tuple[int, int]]:
        factor = self.config.get("decompose_factor", -1)
        out_1, out_2 = split(linear.out_features, factor)
        in_1, in_2 = split(linear.in_features, factor)
        return (out_1, in_1), (out_2, in_2)

    def _is_split(self, linear: LinearSpec) -> tuple[bool, bool]:
        """Which of the two factors is saved as a product of its own."""
        rank = self._own_rank(linear)
        one, two = self._shapes(linear)
        return bool(self.config.get("decompose_both", False)) and rank < max(one) / 2, rank < max(two) / 2

    def bound(self, linear: LinearSpec) -> int:
        ranks = [
            self._own_rank(linear) if is_split else min(shape)
            for shape, is_split in zip(self._shapes(linear), self._is_split(linear), strict=True)
        ]
        return ranks[0] * ranks[1]

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = self._own_rank(linear)
        rules: dict[str, TensorRule] = {}
        for name, shape, is_split in zip(
            ("lokr_w1", "lokr_w2"), self._shapes(linear), self._is_split(linear), strict=True
        ):
            if is_split:
                rules |= {f"{name}_a": TensorRule((shape[0], rank)), f"{name}_b": TensorRule((rank, shape[1]))}
            else:
                rules[name] = TensorRule(shape)
        return rules

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        (left_1, right_1), (left_2, right_2) = _pair("lokr_w1", parts), _pair("lokr_w2", parts)
        scaling = self._scaling(linear)

        def dense() -> Tensor:
            one, two = left_1 @ right_1, left_2 @ right_2
            # kron by its definition, block (i, j) = one[i, j] * two
            blocks = one[:, None, :, None] * two[None, :, None, :]
            return blocks.reshape(linear.out_features, linear.in_features) * scaling

        def factors() -> tuple[Tensor, Tensor]:
            return torch.kron(right_1, right_2), torch.kron(left_1, left_2)

        return from_factors(linear, right_1.shape[0] * right_2.shape[0], factors, scaling, self.conversion, dense)


def _pair(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Left and right factor of one matrix; of a matrix saved whole, itself and the identity of its shorter side."""
    if name not in parts:
        return parts[f"{name}_a"].float(), parts[f"{name}_b"].float()
    whole = parts[name].float()
    if whole.shape[0] <= whole.shape[1]:
        return torch.eye(whole.shape[0]), whole
    return whole, torch.eye(whole.shape[1])
