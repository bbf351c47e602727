"""PEFT RandLoRA (Albert et al., arXiv:2502.00987): a sum of low-rank products of random bases, together of full rank.

The bases ``base_model.randlora_A [r, 1, smaller side]`` and ``base_model.randlora_B [larger side, n, r]`` belong to all
linears, cut to each; a linear trains ``randlora_lambda [r, n]`` and ``randlora_gamma [n, min(in, out)]`` with ``n =
ceil(min(in, out) / r)`` products. A is scaled to ``lambda[r, n] A[r] gamma[n]`` and stands on the narrower side of the
linear. PEFT lays the directions of A out by r, then n, and those of B by n, then r, and pairs them in these orders.
Scaling is ``randlora_alpha / r``. The ranks of the products add up to min(in, out) or more, so the delta has full rank.
PEFT saves the bases once more beside every linear; such copies must be equal. Bases that are not saved are drawn in a
narrow dtype that hangs on the machine: they are not drawn again here. Source: peft 0.21,
``tuners/randlora/{layer,model}.py``.
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
    INTEGER,
    LAYER_FIELDS,
    RANK,
    FieldRule,
    one_of,
)
from deltaserve_store.formats.peft_kinds.low_rank import converted
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

SHARED_A, SHARED_B = "base_model.randlora_A", "base_model.randlora_B"


class RandLora(PeftReader):
    peft_type = "RANDLORA"
    title = "RandLoRA"
    source = "`randlora_lambda`, `randlora_gamma`; shared `randlora_A`, `randlora_B`"
    delta = "`alpha / r · Σ B_n diag(λ_n) A diag(γ_n)`"
    term = "low rank, rank min(in, out)"
    limits = "bases left out (`save_projection: false`); an error above the limit, where the rank exceeds the bound"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **LAYER_FIELDS,
        "r": RANK,
        "randlora_alpha": ALPHA,
        "save_projection": FieldRule(
            "understood", one_of(True), "true (the machine decides the dtype of the draw)", "seed_not_usable"
        ),
        "projection_prng_key": INTEGER,
        "sparse": FLAG,
        "very_sparse": FLAG,
        "randlora_dropout": FRACTION,
        "bias": BIAS,
        "init_weights": FLAG,
    }

    def _num_bases(self, smaller_side: int) -> int:
        return -(-smaller_side // int(self.config["r"]))

    def rank(self, linear: LinearSpec) -> int:
        return self.conversion.rank_of(linear, min(linear.out_features, linear.in_features))

    def shared_layout(self) -> Mapping[str, TensorRule]:
        rank = int(self.config["r"])
        sides = [
            max(linear.out_features for linear in self.linears),
            max(linear.in_features for linear in self.linears),
        ]
        return {
            SHARED_A: TensorRule((rank, 1, min(sides))),
            SHARED_B: TensorRule((max(sides), self._num_bases(min(sides)), rank)),
        }

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        narrow = min(linear.out_features, linear.in_features)
        bases = self._num_bases(narrow)
        shared = self.shared_layout()
        return {
            "randlora_lambda": TensorRule((int(self.config["r"]), bases)),
            "randlora_gamma": TensorRule((bases, narrow)),
            "randlora_A": TensorRule(shared[SHARED_A].shape, optional=True),
            "randlora_B": TensorRule(shared[SHARED_B].shape, optional=True),
        }

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        self._bases = {"randlora_A": shared[SHARED_A].float(), "randlora_B": shared[SHARED_B].float()}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        scales, gains = parts["randlora_lambda"].float(), parts["randlora_gamma"].float()
        rank, bases = scales.shape
        narrow, wide = sorted((linear.out_features, linear.in_features))
        a, b = self._bases["randlora_A"][:, 0, :narrow], self._bases["randlora_B"][:wide, :bases]
        for name, basis in self._bases.items():
            if name in parts and not torch.equal(parts[name].float(), basis):
                where = f"{PEFT_PREFIX}{linear.name}.{name}"
                findings.add("invalid_value", where, "other values than the shared ones", f"those of base_model.{name}")
        scaling = float(self.config["randlora_alpha"]) / rank

        def dense() -> Tensor:
            """Direction i of A is (i // n, i % n), direction i of B (i % r, i // r)."""
            index = torch.arange(rank * bases)
            scaled = scales[index // bases, index % bases, None] * a[index // bases] * gains[index % bases]
            return _turned(b[:, index // rank, index % rank] @ scaled, linear) * scaling

        flat = (scales[:, :, None] * a[:, None, :] * gains).reshape(-1, narrow)
        delta = _turned((b.reshape(wide, -1).double() @ flat.double()).float(), linear) * scaling
        return converted(linear, delta, self.conversion, dense)


def _turned(product: Tensor, linear: LinearSpec) -> Tensor:
    """``[wide, narrow]`` -> ``[out, in]``; a square product is laid out as it is."""
    return product if linear.in_features <= linear.out_features else product.t().contiguous()
