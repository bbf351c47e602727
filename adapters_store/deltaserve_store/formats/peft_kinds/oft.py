"""PEFT OFT (Qiu et al., arXiv:2306.07280): a linear's inputs are turned by orthogonal blocks, ``y = W R(x) + b``.

``oft_R.weight`` [n / b, b (b - 1) / 2] holds the upper triangles of skew-symmetric Q, row by row; [1, ...] with
``block_share``. A row vector's block becomes ``z R`` with the Cayley transform ``R = (I - Q)(I + Q)^-1``, or with
``use_cayley_neumann`` the polynomial that PEFT puts in its place, ``I + 2 Q + 2 Q^2 + ... + Q^m``: the series of
``(I + Q)(I - Q)^-1``, of the other sense of rotation, and orthogonal only up to its rest. That polynomial is what the
adapter was trained with and what is served. With ``coft`` Q is shortened to the length ``eps / sqrt(rows)`` first.

PEFT moves a block size or number that does not divide the inputs to the nearest one that does, in silence and without
a word in the config; so it is done here. Source: peft 0.21, ``tuners/oft/{config,layer}.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

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
    is_bool,
    is_int,
)
from deltaserve_store.formats.peft_kinds.cayley import (
    MAX_BLOCK,
    MAX_TERMS,
    SIZE,
    cayley,
    cayley_change,
    check_block,
    check_orthogonal,
    check_sizes,
    series_change,
    turn_columns,
)
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import Kind
from deltaserve_store.rotation_deltas import RotationBlocks, RotationDelta
from deltaserve_store.spec import LinearSpec

MAX_LENGTH = 65536.0
"""Of ``eps``: JSON has integers that no float holds."""
_SWITCH = FieldRule("understood", is_bool, "true or false", required=True)


def _is_length(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= MAX_LENGTH


class Oft(PeftReader):
    peft_type = "OFT"
    title = "OFT"
    source = "`oft_R.weight`"
    delta = "`W (Rᵀ - I)`"
    term = "rotation of inputs, blocks of b"
    limits = f"blocks of more than {MAX_BLOCK}; Conv1D; strengths between 0 and 1"
    kind: ClassVar[Kind] = "rotation"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **SELECTION_FIELDS,
        "r": SIZE,
        "oft_block_size": SIZE,
        "coft": _SWITCH,
        "eps": FieldRule("understood", _is_length, f"a number from 0 to {MAX_LENGTH:g}", required=True),
        "block_share": _SWITCH,
        # Its default has changed between versions of PEFT: a file that does not say it is not understood.
        "use_cayley_neumann": _SWITCH,
        "num_cayley_neumann_terms": FieldRule(
            "understood", lambda value: is_int(value) and 1 <= value <= MAX_TERMS, f"1 to {MAX_TERMS}", required=True
        ),
        "bias": BIAS,
        "module_dropout": FRACTION,
        "init_weights": FLAG,
    }

    def check(self, findings: Findings) -> None:
        check_sizes(dict(self.config), ("oft_block_size", "r"), self.linears, self.where, findings)
        for linear in self.linears if not findings else ():
            check_block(self._block_size(linear), linear.name, findings)

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        size = self._block_size(linear)
        count = 1 if self.config["block_share"] else linear.in_features // size
        return {"oft_R.weight": TensorRule((count, size * (size - 1) // 2))}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> RotationDelta:
        skew = self._skew(parts["oft_R.weight"].double(), self._block_size(linear))
        if self.config["use_cayley_neumann"]:
            changes = series_change(skew, self.config["num_cayley_neumann_terms"])
        else:
            changes = cayley_change(skew)
            check_orthogonal(skew, f"{PEFT_PREFIX}{linear.name}.oft_R.weight", findings)
        return RotationDelta(
            linear.name,
            "input",
            (RotationBlocks(changes.float().contiguous()),),
            lambda weight: self._turn(weight, skew),
        )

    def _block_size(self, linear: LinearSpec) -> int:
        if size := self.config["oft_block_size"]:
            return nearest_divisor(linear.in_features, size)
        return linear.in_features // nearest_divisor(linear.in_features, self.config["r"])

    def _skew(self, upper: Tensor, size: int) -> Tensor:
        """Q, float64 [rows, b, b], of its upper triangles [rows, b (b - 1) / 2]."""
        skew = upper.new_zeros(len(upper), size, size)
        rows, cols = torch.triu_indices(size, size, 1)
        skew[:, rows, cols] = upper
        skew = skew - skew.transpose(1, 2)
        if not self.config["coft"]:
            return skew
        longest = self.config["eps"] / math.sqrt(len(upper))
        lengths = torch.linalg.matrix_norm(skew, keepdim=True)
        return torch.where(lengths <= longest, skew, skew * (longest / lengths))

    def _turn(self, weight: Tensor, skew: Tensor) -> Tensor:
        """``W R'`` with R as PEFT computes it, step by step."""
        if not self.config["use_cayley_neumann"]:
            return turn_columns(weight, cayley(skew)).float()
        terms = self.config["num_cayley_neumann_terms"]
        turned = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
        if terms > 1:
            turned += 2 * skew
        if terms > 2:
            power = skew @ skew
            turned += 2 * power
            for _ in range(3, terms - 1):
                power = power @ skew
                turned += 2 * power
            turned += power @ skew
        return turn_columns(weight, turned).float()


def nearest_divisor(total: int, wanted: int) -> int:
    """The divisor of ``total`` next to ``wanted``, the lower of two as near; ``total`` for what is beyond it."""
    if wanted >= total:
        return total
    higher = next(number for number in range(wanted, total + 1) if total % number == 0)
    lower = next(number for number in range(wanted, 0, -1) if total % number == 0)
    return lower if wanted - lower <= higher - wanted else higher
