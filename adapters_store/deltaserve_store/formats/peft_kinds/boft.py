"""PEFT BOFT (Liu et al., arXiv:2311.06243): inputs turned by a product of sparse orthogonal factors, outputs scaled.

``boft_R`` [m, n / b, b, b] holds m factors of n / b blocks M each; the Cayley transform of ``Q = (M - M') / 2`` is
orthogonal. Factor i is ``B_i = P_i diag(blocks) P_i'`` with a permutation that cuts every run of ``2^i b`` inputs into
pieces of b / 2 and puts the even pieces before the odd ones. ``boft_s`` [out, 1] multiplies the product, the bias not:
``y = s * W (x B_m-1 ... B_0) + b``. With one factor nothing is permuted, which is OFT; where PEFT finds no compiler
for its CUDA code it trains one factor whatever ``boft_n_butterfly_factor`` says, and such files are read as what they
hold. Source: peft 0.21, ``tuners/boft/{config,layer}.py``.
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
    FLAG,
    FRACTION,
    SELECTION_FIELDS,
    FieldRule,
    is_int,
)
from deltaserve_store.formats.peft_kinds.cayley import (
    MAX_BLOCK,
    SIZE,
    cayley,
    cayley_change,
    check_block,
    check_orthogonal,
    check_sizes,
    turn_columns,
)
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import Kind
from deltaserve_store.rotation_deltas import RotationBlocks, RotationDelta
from deltaserve_store.spec import LinearSpec

MAX_FACTORS = 16


class Boft(PeftReader):
    peft_type = "BOFT"
    title = "BOFT"
    source = "`boft_R`, `boft_s`"
    delta = "`diag(s) W B₀ᵀ ... Bₘ₋₁ᵀ - W`"
    term = "rotation of inputs, m factors of blocks of b, and a scale of outputs"
    limits = f"blocks of more than {MAX_BLOCK}; Conv1D; strengths between 0 and 1"
    kind: ClassVar[Kind] = "rotation"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **SELECTION_FIELDS,
        "boft_block_size": SIZE,
        "boft_block_num": SIZE,
        "boft_n_butterfly_factor": FieldRule(
            "understood",
            lambda value: is_int(value) and 1 <= value <= MAX_FACTORS,
            f"1 to {MAX_FACTORS}",
            required=True,
        ),
        "bias": BIAS,
        "boft_dropout": FRACTION,
        "init_weights": FLAG,
    }

    def check(self, findings: Findings) -> None:
        fields = ("boft_block_size", "boft_block_num")
        check_sizes(dict(self.config), fields, self.linears, self.where, findings)
        count = self.config["boft_n_butterfly_factor"]
        field = next((name for name in fields if self.config[name]), fields[0])
        for linear in self.linears if not findings else ():
            given, inputs = self.config[field], linear.in_features
            if inputs % given:
                allowed = f"a divisor of {inputs}, the inputs of {linear.name}"
                findings.add("invalid_value", f"{self.where}:{field}", given, allowed)
                return
            size = self._block_size(linear)
            check_block(size, linear.name, findings)
            if count > 1 and (size % 2 or inputs % (size << (count - 1))):
                allowed = f"even blocks of which 2^{count - 1} fit a whole number of times into {inputs}, {linear.name}"
                findings.add("invalid_value", f"{self.where}:boft_n_butterfly_factor", f"blocks of {size}", allowed)
                return

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        size = self._block_size(linear)
        blocks = (linear.in_features // size, size, size)
        return {
            "boft_R": TensorRule((self.config["boft_n_butterfly_factor"], *blocks), other=(1, *blocks)),
            "boft_s": TensorRule((linear.out_features, 1)),
        }

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> RotationDelta:
        given = parts["boft_R"].double()
        skews = 0.5 * (given - given.transpose(-1, -2))
        places = [permutation(linear.in_features, given.shape[-1], level) for level in range(len(given))]
        changes = cayley_change(skews).float()
        check_orthogonal(skews, f"{PEFT_PREFIX}{linear.name}.boft_R", findings)
        # The last factor stands next to x; a first one leaves every input at its place.
        factors = [
            RotationBlocks(changes[level].contiguous(), None if level == 0 else places[level].argsort().int())
            for level in reversed(range(len(given)))
        ]

        def turn(weight: Tensor) -> Tensor:
            """``W B_0' B_1' ...``, factor by factor."""
            turned = weight.double()
            for level, skew in enumerate(skews):
                moved = torch.empty_like(turned)
                moved[:, places[level]] = turned
                turned = turn_columns(moved, cayley(skew))[:, places[level]]
            return turned.float()

        return RotationDelta(linear.name, "input", tuple(factors), turn, parts["boft_s"].flatten())

    def _block_size(self, linear: LinearSpec) -> int:
        return int(self.config["boft_block_size"]) or linear.in_features // int(self.config["boft_block_num"])


def permutation(inputs: int, size: int, level: int) -> Tensor:
    """PEFT's ``block_butterfly_perm`` of one factor, int64 [inputs]: place of the sorted row -> place in the row."""
    if level == 0:
        return torch.arange(inputs)
    return torch.arange(inputs).view(-1, 1 << level, 2, size // 2).transpose(1, 2).reshape(-1)
