"""PEFT HRA (Yuan et al., arXiv:2405.17484): the inputs of a linear are reflected r times, ``W H_1 ... H_r``.

``hra_u [in, r]`` holds a direction u a column, made unit length when it is used: ``H = I - 2 u u'``. The product of
the reflections is ``I - U T U'`` with an upper triangular T (the compact WY form of Householder products), so that the
delta is ``-(W U T) U'``, of rank r. With ``apply_GS`` the directions are made orthogonal first, and T is 2 I. Source:
peft 0.21, ``tuners/hra/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import BIAS, COMMON_FIELDS, FLAG, RANK, SELECTION_FIELDS, SWITCH, FieldRule
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import WeightDelta
from deltaserve_store.spec import LinearSpec

_SMALLEST_LENGTH = 1e-6
"""Relative to the longest direction: below that, the direction of a column is rounding (or NaN in PEFT)."""


class Hra(PeftReader):
    peft_type = "HRA"
    title = "HRA"
    source = "`hra_u`"
    delta = "`-(W U T) Uᵀ`"
    limits = "directions of length 0; with `apply_GS`, directions that depend on each other"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        **SELECTION_FIELDS,
        "r": RANK,
        "apply_GS": SWITCH,
        "bias": BIAS,
        "init_weights": FLAG,
    }

    def check(self, findings: Findings) -> None:
        for linear in self.linears:
            if self.config["r"] > linear.in_features:
                allowed = f"at most {linear.in_features}, the inputs of {linear.name}"
                findings.add("rank_out_of_range", f"{self.where}:r", self.config["r"], allowed)

    def rank(self, linear: LinearSpec) -> int:
        return int(self.config["r"])

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        return {"hra_u": TensorRule((linear.in_features, int(self.config["r"])))}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> WeightDelta:
        u = parts["hra_u"].float()
        is_orthogonal = bool(self.config.get("apply_GS", False))
        # R of a QR decomposition has on its diagonal what is left of each direction beside those before it.
        lengths = torch.linalg.qr(u.double()).R.diagonal().abs() if is_orthogonal else u.norm(dim=0)
        if bool((lengths <= _SMALLEST_LENGTH * u.norm(dim=0).max()).any()):
            allowed = "independent directions" if is_orthogonal else "directions of some length"
            name = f"{PEFT_PREFIX}{linear.name}.hra_u"
            findings.add("invalid_value", name, f"a direction of length {float(lengths.min()):.3g}", allowed)
        directions = torch.linalg.qr(u.double()).Q if is_orthogonal else u.double() / u.double().norm(dim=0)
        turns = _turns(directions)

        def dense(weight: Tensor) -> Tensor:
            """One reflection after the other, as PEFT applies them."""
            turned = weight.double()
            for index in range(directions.shape[1]):
                direction = directions[:, index]
                turned = turned - 2 * (turned @ direction)[:, None] * direction
            return (turned - weight.double()).float()

        return WeightDelta(linear.name, -(directions @ turns).float(), directions.t().float().contiguous(), dense)


def _turns(directions: Tensor) -> Tensor:
    """T of ``H_1 ... H_r = I - U T U'``, float64 ``[r, r]``, from unit columns ``[in, r]``.

    Multiplying by one more reflection v adds to T the column ``-2 T U'v`` above a 2.
    """
    rank = directions.shape[1]
    products = directions.t() @ directions
    turns = torch.zeros(rank, rank, dtype=directions.dtype)
    for index in range(rank):
        turns[:index, index] = -2 * turns[:index, :index] @ products[:index, index]
        turns[index, index] = 2
    return turns
