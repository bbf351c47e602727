"""PEFT MiSS and GraLoRA: low-rank terms whose factors repeat or lie in blocks.

MiSS (Kang and Yin, arXiv:2409.15371, formerly Bone): ``miss_block [r, out]``; input j meets row ``j mod r`` of it, so
that A is the 0/1 matrix that sums inputs by remainder, and B the block transposed. With ``init_weights: "mini"`` the
block is ``[r, mini_r]`` and repeats over the outputs. With "bat" every r outputs have a block ``[r, r]``, and each r x
r tile of the base's weight changes by itself times that block, plus that block: a delta of the weight's rank. GraLoRA
(Jung et al., arXiv:2505.20355): inputs and outputs are cut into k parts; ``gralora_A [k, in/k, r]``, ``gralora_B [k, r,
out/k]``, and the r directions of every input part are dealt to all output parts, r/k each. Each input part has r
directions of its own, so the rank is ``k * r`` and no less in general. ``hybrid_r`` more directions are a plain LoRA.
Scaling ``alpha / (r + hybrid_r)``. Sources: peft 0.21, ``tuners/{miss,gralora}/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    LAYER_FIELDS,
    MAX_RANK,
    RANK,
    SELECTION_FIELDS,
    FieldRule,
    is_int,
    one_of,
)
from deltaserve_store.formats.peft_kinds.low_rank import converted
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import FunctionDelta, LoraDelta
from deltaserve_store.spec import LinearSpec


class Miss(PeftReader):
    peft_type = "MISS"
    title = "MiSS"
    source = "`miss_block`"
    delta = "`dW[o, j] = block[j mod r, o]`; bat: `dW[O, I] = W[O, I] block[O] + block[O]`"
    term = "low rank, rank r; bat: rank min(in, out)"
    limits = "bat: an error above the limit, where the rank exceeds the bound"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        **SELECTION_FIELDS,
        "r": RANK,
        "mini_r": FieldRule("understood", lambda value: is_int(value) and value >= 1, "an integer above 0"),
        "init_weights": FieldRule(
            "understood", one_of(True, False, "mini", "bat"), "true, false, mini or bat", "unsupported_feature"
        ),
        "bias": BIAS,
        "miss_dropout": FRACTION,
    }

    def _width(self, linear: LinearSpec) -> int:
        is_mini = self.config.get("init_weights", True) == "mini"
        return int(self.config.get("mini_r", 1)) if is_mini else linear.out_features

    def _is_bat(self) -> bool:
        return bool(self.config.get("init_weights", True) == "bat")

    def check(self, findings: Findings) -> None:
        for linear in self.linears:
            if self._is_bat():
                for size in (linear.in_features, linear.out_features):
                    if size % self.config["r"]:
                        allowed = f"a divisor of {size}, a side of {linear.name}"
                        findings.add("invalid_value", f"{self.where}:r", self.config["r"], allowed)
                continue
            if self.config["r"] > linear.in_features:
                allowed = f"at most {linear.in_features}, the inputs of {linear.name}"
                findings.add("rank_out_of_range", f"{self.where}:r", self.config["r"], allowed)
            if linear.out_features % self._width(linear):
                allowed = f"a divisor of {linear.out_features}, the outputs of {linear.name}"
                findings.add("invalid_value", f"{self.where}:mini_r", self._width(linear), allowed)

    def bound(self, linear: LinearSpec) -> int | None:
        return linear.narrow if self._is_bat() else None

    def rank(self, linear: LinearSpec) -> int | None:
        return super().rank(linear) if self._is_bat() else int(self.config["r"])

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = int(self.config["r"])
        if self._is_bat():
            return {"miss_block": TensorRule((linear.out_features // rank, rank, rank))}
        return {"miss_block": TensorRule((rank, self._width(linear)))}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta | FunctionDelta:
        block = parts["miss_block"].float()
        if self._is_bat():
            return self._bat(linear, block)
        rank, repeats = block.shape[0], linear.out_features // block.shape[1]
        remainder = torch.arange(linear.in_features) % rank
        a = (remainder == torch.arange(rank)[:, None]).float()
        return LoraDelta(
            linear.name, a, block.t().repeat(repeats, 1), 1.0, dense=lambda: block.repeat(1, repeats)[remainder].t()
        )

    def _bat(self, linear: LinearSpec, block: Tensor) -> FunctionDelta:
        def term(delta: Tensor, dense: Callable[[], Tensor]) -> LoraDelta:
            return converted(linear, delta, self.conversion, dense)

        def dense(weight: Tensor) -> Tensor:
            """Block after block of inputs: those of the weight by those of the file, r outputs at a time."""
            rank, total = block.shape[2], torch.empty_like(weight)
            for start in range(0, weight.shape[1], rank):
                part = weight[:, start : start + rank].reshape(-1, rank, rank)
                total[:, start : start + rank] = (torch.bmm(part, block) + block).reshape(-1, rank)
            return total

        return FunctionDelta(
            linear.name, (block,), self.conversion.rank_of(linear, linear.narrow), _bat_delta, term, dense
        )


def _bat_delta(weight: Tensor, block: Tensor) -> Tensor:
    count, rank, _ = block.shape
    tiles = weight.view(count, rank, -1, rank)
    return (torch.einsum("oaic,ocd->oaid", tiles, block) + block[:, :, None, :]).reshape(weight.shape)


class GraLora(PeftReader):
    peft_type = "GRALORA"
    title = "GraLoRA"
    source = "`gralora_A`, `gralora_B`; with `hybrid_r` also `gralora_A_general.weight`, `gralora_B_general.weight`"
    delta = "`alpha / (r + hybrid_r) · (blocks + B_general A_general)`"
    term = "low rank, rank k · r + hybrid_r"
    limits = "k that does not divide r, the inputs or the outputs"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **LAYER_FIELDS,
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
