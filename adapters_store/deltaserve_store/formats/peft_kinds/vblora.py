"""PEFT VB-LoRA (Li et al., arXiv:2405.15179): A and B are made of short vectors from a bank that all linears share.

``vblora_logits_A [r, in/v, n]`` and ``vblora_logits_B [out/v, r, n]`` choose, for each piece of length v of a row of A
or a column of B, the ``topk`` vectors of ``base_model.vblora_vector_bank [n, v]`` and mix them by a softmax over their
logits. Equal logits at the border are broken as ``torch.topk`` on a CPU breaks them. With ``save_only_topk_weights``
the file holds, for each matrix of logits, ``..._topk_indices [.., k]`` and the softmax's values but the last,
``..._topk_weights [.., k - 1]``; the last is what they lack to 1. Source: peft 0.21,
``tuners/vblora/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    BIAS,
    COMMON_FIELDS,
    FRACTION,
    NUMBER,
    RANK,
    SELECTION_FIELDS,
    SWITCH,
    FieldRule,
    is_int,
)
from deltaserve_store.formats.peft_kinds.reader import INDEX_DTYPES, PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

_ROUNDING = 1e-5
BANK = "base_model.vblora_vector_bank"
_SIZE = FieldRule(
    "understood", lambda value: is_int(value) and 1 <= value <= 1 << 20, "an integer above 0", required=True
)


class VbLora(PeftReader):
    peft_type = "VBLORA"
    title = "VB-LoRA"
    source = (
        "`vblora_logits_A`, `vblora_logits_B`, or their `_topk_indices`, `_topk_weights`; shared `vblora_vector_bank`"
    )
    delta = "`B A` of mixed bank vectors"
    limits = "weights that are no part of a softmax"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **SELECTION_FIELDS,
        "r": RANK,
        "num_vectors": _SIZE,
        "vector_length": _SIZE,
        "topk": _SIZE,
        "save_only_topk_weights": SWITCH,
        "bias": BIAS,
        "vblora_dropout": FRACTION,
        "init_vector_bank_bound": NUMBER,
        "init_logits_std": NUMBER,
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
        choices = {"A": (rank, linear.in_features // length), "B": (linear.out_features // length, rank)}
        if not self._is_cut():
            return {f"vblora_logits_{side}": TensorRule((*shape, count)) for side, shape in choices.items()}
        best = int(self.config["topk"])
        rules: dict[str, TensorRule] = {}
        for side, shape in choices.items():
            rules[f"vblora_logits_{side}_topk_indices"] = TensorRule((*shape, best), ("U8", "I16", *INDEX_DTYPES))
            rules[f"vblora_logits_{side}_topk_weights"] = TensorRule((*shape, best - 1))
        return rules

    def _is_cut(self) -> bool:
        return bool(self.config.get("save_only_topk_weights", False))

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        self._bank = shared[BANK].float()

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        rank, bank = self._sizes()[0], self._bank
        if self._is_cut():
            return self._from_weights(linear, parts, findings)
        logits_a, logits_b = parts["vblora_logits_A"].float(), parts["vblora_logits_B"].float()

        def dense() -> Tensor:
            """By a full softmax in which the vectors that are not chosen weigh nothing."""
            a = (self._weights(logits_a) @ bank).reshape(rank, -1)
            b = (self._weights(logits_b) @ bank).permute(0, 2, 1).reshape(-1, rank)
            return b @ a

        a = self._mix(logits_a).reshape(rank, linear.in_features)
        b = self._mix(logits_b).transpose(1, 2).reshape(linear.out_features, rank)
        return LoraDelta(linear.name, a, b, 1.0, dense=dense)

    def _from_weights(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        rank, count, _ = self._sizes()
        bank = self._bank
        mixed: dict[str, Tensor] = {}
        chosen: dict[str, tuple[Tensor, Tensor]] = {}
        for side in "AB":
            name = f"{PEFT_PREFIX}{linear.name}.vblora_logits_{side}"
            places = parts[f"vblora_logits_{side}_topk_indices"].long()
            if not (int(places.min()) >= 0 and int(places.max()) < count):
                found = f"{int(places.min())}..{int(places.max())}"
                findings.add("index_out_of_range", f"{name}_topk_indices", found, f"0..{count - 1}")
                places = places.clamp(0, count - 1)
            first = parts[f"vblora_logits_{side}_topk_weights"].float()
            weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], dim=-1)
            if float(weights.min()) < -_ROUNDING:
                allowed = "parts of a softmax: from 0 to 1, of a sum of at most 1"
                findings.add("invalid_value", f"{name}_topk_weights", f"a part of {float(weights.min()):.3g}", allowed)
            weights = weights.clamp(min=0.0)
            mixed[side] = _mixed(places, weights, bank)
            chosen[side] = places, weights

        def dense() -> Tensor:
            """Every vector of the bank with its share, most of them 0: so the shares are a sparse matrix."""
            a, b = (_by_shares(*chosen[side], bank) for side in "AB")
            return b.permute(0, 2, 1).reshape(-1, rank) @ a.reshape(rank, -1)

        a = mixed["A"].reshape(rank, linear.in_features)
        b = mixed["B"].transpose(1, 2).reshape(linear.out_features, rank)
        return LoraDelta(linear.name, a, b, 1.0, dense=dense)

    def _mix(self, logits: Tensor) -> Tensor:
        """``[..., n]`` -> ``[..., v]``."""
        best, places = logits.topk(self.config["topk"], dim=-1)
        return _mixed(places, best.softmax(-1), self._bank)

    def _weights(self, logits: Tensor) -> Tensor:
        places = logits.topk(self.config["topk"], dim=-1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, places, True)
        return logits.masked_fill(~chosen, float("-inf")).softmax(-1)


def _mixed(places: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    """``[..., k]`` each -> ``[..., v]``, the vectors at ``places`` summed as they are looked up: all of them side by
    side would be k times the size of what they make."""
    flat = places.reshape(-1, places.shape[-1])
    mixed = F.embedding_bag(flat, bank, mode="sum", per_sample_weights=weights.reshape(flat.shape))
    return mixed.view(*places.shape[:-1], -1)


def _by_shares(places: Tensor, weights: Tensor, bank: Tensor) -> Tensor:
    """The same by a product with the matrix of shares, one row for each piece; a vector chosen twice has both."""
    flat = places.reshape(-1, places.shape[-1])
    rows = torch.arange(len(flat)).repeat_interleave(flat.shape[1])
    shares = torch.sparse_coo_tensor(
        torch.stack([rows, flat.flatten()]), weights.flatten(), (len(flat), len(bank)), check_invariants=False
    )
    return torch.sparse.mm(shares, bank).view(*places.shape[:-1], -1)
