"""PEFT DEFT and PaRa: a subspace of the base's outputs is removed and, but for PaRa, filled anew.

``deft_P [out, r]`` and ``deft_R [r, in]``; with ``Q`` and ``V`` made of P the delta is ``Q (s R - V' W)``, of rank r:
the projection is multiplied out with the base's weights. ``decomposition_method`` relu: Q = P, V = relu(P). qr: Q = V =
the orthonormal factor of P, with the signs of Householder's method, as LAPACK has them. ``para``: no R. ``s`` is
``alpha / r``, or 1. ``r`` is at most the outputs. Source: peft 0.21, ``tuners/deft/layer.py``.
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
    NUMBER,
    RANK,
    SELECTION_FIELDS,
    SWITCH,
    FieldRule,
    is_alpha,
    one_of,
)
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import FunctionDelta, LoraDelta
from deltaserve_store.spec import LinearSpec

_SMALLEST_LENGTH = 1e-6
"""Of the longest column of P: what is left of one beside those before it; below, its direction is rounding."""


class Deft(PeftReader):
    peft_type = "DEFT"
    title = "DEFT"
    source = "`deft_P`, `deft_R` (PaRa: `deft_P` alone)"
    delta = "`Q (s R - Vᵀ W)`; Q and V of P"
    limits = "with `qr`, columns of P that depend on each other"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **SELECTION_FIELDS,
        "r": RANK,
        "alpha": FieldRule("understood", lambda value: value is None or is_alpha(value), f"null or {ALPHA.allowed}"),
        "decomposition_method": FieldRule("understood", one_of("relu", "qr"), "relu or qr"),
        "para": SWITCH,
        "init_scale": NUMBER,
        "bias": BIAS,
        "deft_dropout": FRACTION,
        "init_weights": FLAG,
    }

    def rank(self, linear: LinearSpec) -> int:
        return min(int(self.config["r"]), linear.out_features)

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = self.rank(linear)
        rules = {"deft_P": TensorRule((linear.out_features, rank))}
        if not self.config.get("para", False):
            rules["deft_R"] = TensorRule((rank, linear.in_features))
        return rules

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> FunctionDelta:
        p, rank = parts["deft_P"].float(), self.rank(linear)
        is_qr = self.config.get("decomposition_method", "relu") == "qr"
        if is_qr:
            left = torch.linalg.qr(p.double())
            lengths = left.R.diagonal().abs()
            if float(lengths.min()) <= _SMALLEST_LENGTH * float(p.norm(dim=0).max()):
                found = f"a direction of length {float(lengths.min()):.3g}"
                findings.add("invalid_value", f"{PEFT_PREFIX}{linear.name}.deft_P", found, "independent directions")
            basis, remover = left.Q.float(), left.Q.float()
        else:
            basis, remover = p, p.relu()
        alpha = self.config.get("alpha")
        scaling = 1.0 if alpha is None else alpha / rank
        filled = parts["deft_R"].float() * scaling if "deft_R" in parts else torch.zeros(rank, linear.in_features)

        def rows(weight: Tensor, remover: Tensor, filled: Tensor) -> Tensor:
            return (filled.double() - remover.double().t() @ weight.double()).float()

        def term(a: Tensor, dense: Callable[[], Tensor]) -> LoraDelta:
            return LoraDelta(linear.name, a, basis, 1.0, dense=dense)

        def dense(weight: Tensor) -> Tensor:
            """The weight without the subspace, and what stands in its place, less the weight."""
            one, other = (_orthonormal(p),) * 2 if is_qr else (p.double(), torch.where(p > 0, p, 0.0).double())
            wanted = weight.double() - one @ (other.t() @ weight.double())
            if "deft_R" in parts:
                wanted = wanted + one @ (parts["deft_R"].double() * scaling)
            return (wanted - weight.double()).float()

        return FunctionDelta(linear.name, (remover, filled), rank, rows, term, dense)


def _orthonormal(columns: Tensor) -> Tensor:
    """Q of a QR decomposition by reflections one by one, float64: each sends what is left of a column to minus the sign
    of its first entry."""
    rest = columns.double().clone()
    size, count = rest.shape
    basis = torch.eye(size, count, dtype=torch.float64)
    mirrors = []
    for index in range(count):
        mirror = torch.zeros(size, dtype=torch.float64)
        mirror[index:] = rest[index:, index]
        if index < size - 1:  # LAPACK leaves a last single entry as it is
            mirror[index] += mirror.norm() * (1.0 if float(mirror[index]) >= 0 else -1.0)
            mirror /= mirror.norm()
            rest -= 2 * mirror[:, None] * (mirror @ rest)
            mirrors.append(mirror)
    for mirror in reversed(mirrors):
        basis -= 2 * mirror[:, None] * (mirror @ basis)
    return basis
