"""PEFT VB-LoRA (Li et al., arXiv:2405.15179): A and B are made of short vectors from a bank that all linears share.

``vblora_logits_A [r, in/v, n]`` and ``vblora_logits_B [out/v, r, n]`` choose, for each piece of length v of a row of A
or a column of B, the ``topk`` vectors of ``base_model.vblora_vector_bank [n, v]`` and mix them by a softmax over their
logits. Equal logits at the border are broken as ``torch.topk`` on a CPU breaks them. Source: peft 0.21,
``tuners/vblora/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    BIAS,
    COMMON_FIELDS,
    FRACTION,
    RANK,
    SELECTION_FIELDS,
    FieldRule,
    is_int,
    one_of,
)
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

BANK = "base_model.vblora_vector_bank"
_SIZE = FieldRule(
    "understood", lambda value: is_int(value) and 1 <= value <= 1 << 20, "an integer above 0", required=True
)
_NUMBER = FieldRule("descriptive", lambda value: isinstance(value, int | float), "a number")


class VbLora(PeftReader):
    peft_type = "VBLORA"
    title = "VB-LoRA"
    source = "`vblora_logits_A`, `vblora_logits_B`; shared `vblora_vector_bank`"
    delta = "`B A` of mixed bank vectors"
    limits = "`save_only_topk_weights: true` (8- and 16-bit indices are not read)"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **SELECTION_FIELDS,
        "r": RANK,
        "num_vectors": _SIZE,
        "vector_length": _SIZE,
        "topk": _SIZE,
        "save_only_topk_weights": FieldRule(
            "neutral-only", one_of(False), "false (save the logits themselves)", "unsupported_feature"
        ),
        "bias": BIAS,
        "vblora_dropout": FRACTION,
        "init_vector_bank_bound": _NUMBER,
        "init_logits_std": _NUMBER,
    }

    def _sizes(self) -> tuple[int, int, int]:
        return int(self.config["r"]), int(self.config["num_vectors"]), int(self.config["vector_length"])

    def check(self, findings: Findings) -> None:
        _, count, length = self._sizes()
        if self.config["topk"] > count:
            findings.add("invalid_value", f"{self.where}:topk", self.config["topk"], f"at most num_vectors = {count}")
        for linear in self.linears:
            if linear.in_features % length or linear.out_features % length:
                allowed = f"a divisor of {linear.in_features} and {linear.out_features}, the sizes of {linear.name}"
                findings.add("invalid_value", f"{self.where}:vector_length", length, allowed)

    def rank(self, linear: LinearSpec) -> int:
        return int(self.config["r"])

    def shared_layout(self) -> Mapping[str, TensorRule]:
        _, count, length = self._sizes()
        return {BANK: TensorRule((count, length))}

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank, count, length = self._sizes()
        return {
            "vblora_logits_A": TensorRule((rank, linear.in_features // length, count)),
            "vblora_logits_B": TensorRule((linear.out_features // length, rank, count)),
        }

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        self._bank = shared[BANK].float()

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        logits_a, logits_b = parts["vblora_logits_A"].float(), parts["vblora_logits_B"].float()
        rank, bank = self._sizes()[0], self._bank

        def dense() -> Tensor:
            """By a full softmax in which the vectors that are not chosen weigh nothing."""
            a = (self._weights(logits_a) @ bank).reshape(rank, -1)
            b = (self._weights(logits_b) @ bank).permute(0, 2, 1).reshape(-1, rank)
            return b @ a

        a = self._mix(logits_a).reshape(rank, linear.in_features)
        b = self._mix(logits_b).transpose(1, 2).reshape(linear.out_features, rank)
        return LoraDelta(linear.name, a, b, 1.0, dense=dense)

    def _mix(self, logits: Tensor) -> Tensor:
        """``[..., n]`` -> ``[..., v]``."""
        best, places = logits.topk(self.config["topk"], dim=-1)
        return (best.softmax(-1)[..., None] * self._bank[places]).sum(-2)

    def _weights(self, logits: Tensor) -> Tensor:
        places = logits.topk(self.config["topk"], dim=-1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, places, True)
        return logits.masked_fill(~chosen, float("-inf")).softmax(-1)
