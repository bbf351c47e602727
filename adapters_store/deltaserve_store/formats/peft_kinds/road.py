"""PEFT RoAd (Liao et al., arXiv:2409.00119): pairs of a linear's outputs are turned and scaled, ``R (W x + b)``.

Outputs come in groups of ``group_size`` G; number i of a group makes a pair with number i + G / 2. Of a pair (a, b)
with ``c`` the products of scale and cosine and ``s`` those of scale and sine, ``a' = c_a a - s_a b`` and ``b' = c_b b +
s_b a``. ``road_alpha`` are the scales and ``road_theta`` the angles, [out / 2] of pairs (``road_1``), [out] of outputs
(``road_2``), or [2 out], in each group G for the cosines and then G for the sines (``road_4``). Nothing promises that
R is orthogonal. Source: peft 0.21, ``tuners/road/{config,layer}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import COMMON_FIELDS, FLAG, FieldRule, is_int, one_of
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import Kind
from deltaserve_store.rotation_deltas import RotationBlocks, RotationDelta
from deltaserve_store.spec import LinearSpec

VARIANTS = ("road_1", "road_2", "road_4")
_OUTPUTS_PER_VALUE = {"road_1": (1, 2), "road_2": (1, 1), "road_4": (2, 1)}


class Road(PeftReader):
    peft_type = "ROAD"
    title = "RoAd"
    source = "`road_theta`, `road_alpha`"
    delta = "`(R - I) W`, of the bias `(R - I) b`"
    term = "rotation of outputs, blocks of 2"
    limits = "outputs that `group_size` does not divide; strengths between 0 and 1"
    kind: ClassVar[Kind] = "rotation"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        "variant": FieldRule("understood", one_of(*VARIANTS), ", ".join(VARIANTS), required=True),
        "group_size": FieldRule(
            "understood",
            lambda value: is_int(value) and 2 <= value <= 1 << 24 and value % 2 == 0,
            "an even number, 2 or above",
            required=True,
        ),
        "init_weights": FLAG,
    }

    def check(self, findings: Findings) -> None:
        size = self.config["group_size"]
        for linear in self.linears:
            if linear.out_features % size:
                allowed = f"a divisor of {linear.out_features}, the outputs of {linear.name}"
                findings.add("invalid_value", f"{self.where}:group_size", size, allowed)
                return

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        times, over = _OUTPUTS_PER_VALUE[self.config["variant"]]
        shape = (linear.out_features * times // over,)
        return {"road_theta": TensorRule(shape), "road_alpha": TensorRule(shape)}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> RotationDelta:
        del findings
        cosines, sines = self._columns(parts["road_theta"].double(), parts["road_alpha"].double())
        half = self.config["group_size"] // 2
        pairs = torch.arange(linear.out_features).view(-1, 2, half).transpose(1, 2).reshape(-1, 2)
        c, s = cosines[pairs], sines[pairs]
        # Of a row vector (a, b): one column for a', one for b'.
        changes = torch.stack([torch.stack([c[:, 0] - 1, s[:, 1]], 1), torch.stack([-s[:, 0], c[:, 1] - 1], 1)], 1)
        blocks = RotationBlocks(changes.float().contiguous(), pairs.flatten().int())

        def turn(values: Tensor) -> Tensor:
            """[out, K] -> ``R values``: halves of groups changed over, the first with its sign turned."""
            groups = values.double().reshape(-1, 2, half, values.shape[1])
            swapped = torch.stack([-groups[:, 1], groups[:, 0]], 1).reshape(values.shape)
            return (values * cosines[:, None] + swapped * sines[:, None]).float()

        return RotationDelta(linear.name, "output", (blocks,), turn)

    def _columns(self, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Scale times cosine, and scale times sine, [out] each."""
        size, variant = self.config["group_size"], self.config["variant"]
        if variant == "road_1":
            theta, alpha = (values.view(-1, 1, size // 2).expand(-1, 2, -1).flatten() for values in (theta, alpha))
        if variant == "road_4":
            (theta_c, theta_s), (alpha_c, alpha_s) = (values.view(-1, 2, size).unbind(1) for values in (theta, alpha))
            return (alpha_c * theta_c.cos()).flatten(), (alpha_s * theta_s.sin()).flatten()
        return alpha * theta.cos(), alpha * theta.sin()
