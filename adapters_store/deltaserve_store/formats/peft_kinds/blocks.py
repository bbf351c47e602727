"""PEFT MiSS and GraLoRA: low-rank terms whose factors repeat or lie in blocks.

MiSS (Kang and Yin, arXiv:2409.15371, formerly Bone): ``miss_block [r, out]``; input j meets row ``j mod r`` of it, so
that A is the 0/1 matrix that sums inputs by remainder, and B the block transposed. With ``init_weights: "mini"`` the
block is ``[r, mini_r]`` and repeats over the outputs. GraLoRA (Jung et al., arXiv:2505.20355): inputs and outputs are
cut into k parts; ``gralora_A [k, in/k, r]``, ``gralora_B [k, r, out/k]``, and the r directions of every input part are
dealt to all output parts, r/k each. Each input part has r directions of its own, so the rank is ``k * r`` and no
less in general. ``hybrid_r`` more directions are a plain LoRA. Scaling ``alpha / (r + hybrid_r)``. Sources: peft 0.21,
``tuners/{miss,gralora}/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    ALPHA,
    BIAS,
    COMMON_FIELDS,
    FLAG,
    FRACTION,
    MAX_RANK,
    RANK,
    SELECTION_FIELDS,
    FieldRule,
    is_int,
    one_of,
)
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec


class Miss(PeftReader):
    peft_type = "MISS"
    title = "MiSS"
    source = "`miss_block`"
    delta = "`dW[o, j] = block[j mod r, o]`"
    limits = '`init_weights: "bat"`: its delta multiplies the base\'s weights and has full rank'
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        **SELECTION_FIELDS,
        "r": RANK,
        "mini_r": FieldRule("understood", lambda value: is_int(value) and value >= 1, "an integer above 0"),
        "init_weights": FieldRule(
            "understood", one_of(True, False, "mini"), "true, false or mini (bat has full rank)", "unsupported_feature"
        ),
        "bias": BIAS,
        "miss_dropout": FRACTION,
    }

    def _width(self, linear: LinearSpec) -> int:
        is_mini = self.config.get("init_weights", True) == "mini"
        return int(self.config.get("mini_r", 1)) if is_mini else linear.out_features

    def check(self, findings: Findings) -> None:
        for linear in self.linears:
            if self.config["r"] > linear.in_features:
                allowed = f"at most {linear.in_features}, the inputs of {linear.name}"
                findings.add("rank_out_of_range", f"{self.where}:r", self.config["r"], allowed)
            if linear.out_features % self._width(linear):
                allowed = f"a divisor of {linear.out_features}, the outputs of {linear.name}"
                findings.add("invalid_value", f"{self.where}:mini_r", self._width(linear), allowed)

    def rank(self, linear: LinearSpec) -> int:
        return int(self.config["r"])

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        return {"miss_block": TensorRule((int(self.config["r"]), self._width(linear)))}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        block = parts["miss_block"].float()
        rank, repeats = block.shape[0], linear.out_features // block.shape[1]
        remainder = torch.arange(linear.in_features) % rank
        a = (remainder == torch.arange(rank)[:, None]).float()
        return LoraDelta(
            linear.name, a, block.t().repeat(repeats, 1), 1.0, dense=lambda: block.repeat(1, repeats)[remainder].t()
        )


class GraLora(PeftReader):
    peft_type = "GRALORA"
    title = "GraLoRA"
    source = "`gralora_A`, `gralora_B`; with `hybrid_r` also `gralora_A_general.weight`, `gralora_B_general.weight`"
    delta = "`alpha / (r + hybrid_r) · (blocks + B_general A_general)`"
    term = "low rank, rank k · r + hybrid_r"
    limits = "k that does not divide r, the inputs or the outputs"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **{name: rule for name, rule in SELECTION_FIELDS.items() if name != "exclude_modules"},
        "r": RANK,
        "hybrid_r": FieldRule(
            "understood",
            lambda value: is_int(value) and 0 <= value <= MAX_RANK,
            f"an integer from 0 to {MAX_RANK}",
            "rank_out_of_range",
        ),
        "alpha": ALPHA,
        "gralora_k": FieldRule(
            "understood", lambda value: is_int(value) and 1 <= value <= 256, "an integer from 1 to 256"
        ),
        "bias": BIAS,
        "gralora_dropout": FRACTION,
        "init_weights": FLAG,
    }

    def _sizes(self) -> tuple[int, int, int]:
        return int(self.config["r"]), int(self.config.get("gralora_k", 2)), int(self.config.get("hybrid_r", 0))

    def check(self, findings: Findings) -> None:
        rank, k, _ = self._sizes()
        for what, size in (
            ("r", rank),
            *((f"the inputs of {linear.name}", linear.in_features) for linear in self.linears),
            *((f"the outputs of {linear.name}", linear.out_features) for linear in self.linears),
        ):
            if size % k:
                findings.add("invalid_value", f"{self.where}:gralora_k", k, f"a divisor of {size}, {what}")

    def rank(self, linear: LinearSpec) -> int:
        rank, k, hybrid = self._sizes()
        return k * rank + hybrid

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank, k, hybrid = self._sizes()
        rules = {
            "gralora_A": TensorRule((k, linear.in_features // k, rank)),
            "gralora_B": TensorRule((k, rank, linear.out_features // k)),
        }
        if hybrid:
            rules["gralora_A_general.weight"] = TensorRule((hybrid, linear.in_features))
            rules["gralora_B_general.weight"] = TensorRule((linear.out_features, hybrid))
        return rules

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        rank, k, hybrid = self._sizes()
        share = rank // k
        block_a, block_b = parts["gralora_A"].float(), parts["gralora_B"].float()
        # Direction (n, j, s) reads input part n and writes output part j, whose row of B is n * share + s.
        a = torch.zeros(k, k, share, k, linear.in_features // k)
        b = torch.zeros(k, linear.out_features // k, k, k, share)
        for n in range(k):
            a[n, :, :, n] = block_a[n].t().reshape(k, share, -1)
            for j in range(k):
                b[j, :, n, j] = block_b[j, n * share : (n + 1) * share].t()
        a, b = a.reshape(k * rank, -1), b.reshape(-1, k * rank)
        general: tuple[Tensor, Tensor] | None = None
        if hybrid:
            general = parts["gralora_A_general.weight"].float(), parts["gralora_B_general.weight"].float()
            a, b = torch.cat([a, general[0]]), torch.cat([b, general[1]], dim=1)
        scaling = self.config["alpha"] / (rank + hybrid)

        def dense() -> Tensor:
            """PEFT's forward on every unit vector: project each part, deal out the directions, expand."""
            unit = torch.eye(linear.in_features).view(linear.in_features, k, -1)
            hidden = torch.einsum("xni,nir->xnr", unit, block_a).view(-1, k, k, share).permute(0, 2, 1, 3)
            out = torch.einsum("xjr,jro->xjo", hidden.reshape(-1, k, rank), block_b).reshape(linear.in_features, -1)
            total = out.t() if general is None else out.t() + general[1] @ general[0]
            return total * scaling

        return LoraDelta(linear.name, a, b, scaling, dense=dense)
