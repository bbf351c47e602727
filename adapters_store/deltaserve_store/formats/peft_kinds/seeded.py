"""PEFT UniLoRA and TinyLoRA: few trained numbers, spread over A and B by frozen tensors.

UniLoRA (Li et al., arXiv:2506.00799): ``base_model.unilora_theta_d [d]`` holds every trained number; ``A = theta[I_A] *
s_A`` with ``unilora_indices_A``, ``unilora_scales_A`` ``[r, in]``, and B likewise ``[out, r]``. PEFT saves indices and
scales only with ``save_indices``; otherwise numpy shuffles them over all targeted modules in the order in which the
model registers them, which neither numpy nor a list of linears promises.

TinyLoRA (arXiv:2602.04118): ``B R A`` with singular vectors of the base in ``tinylora_A [r, in]``, ``tinylora_B [out,
r]``, and ``R = sum_i v_i P_i`` of ``tinylora_P [u, r, r]`` and ``base_model.tinylora_v.<group> [u]``. Who shares
a group depends on that order too, unless all linears do (``weight_tying: 1.0``). Sources: peft 0.21,
``tuners/{unilora,tinylora}``.
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
    RANK,
    SELECTION_FIELDS,
    FieldRule,
    is_fraction,
    is_int,
    one_of,
)
from deltaserve_store.formats.peft_kinds.reader import INDEX_DTYPES, PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

THETA = "base_model.unilora_theta_d"
VECTOR = "base_model.tinylora_v.0"
_SEED = FieldRule("descriptive", is_int, "an integer")
_NUMBER = FieldRule("descriptive", lambda value: isinstance(value, int | float), "a number")
_SIZE = FieldRule(
    "understood", lambda value: is_int(value) and 1 <= value <= 1 << 24, "an integer above 0", required=True
)
_FIELDS = {
    **COMMON_FIELDS,
    **{name: rule for name, rule in SELECTION_FIELDS.items() if name != "exclude_modules"},
    "r": RANK,
    "bias": BIAS,
}


class UniLora(PeftReader):
    peft_type = "UNILORA"
    title = "UniLoRA"
    source = "`unilora_indices_A`, `_B`, `unilora_scales_A`, `_B`; shared `unilora_theta_d`"
    delta = "`(theta[I_B] ∘ s_B) (theta[I_A] ∘ s_A)`"
    limits = "a seed (`save_indices: false`, PEFT's default): `seed_not_usable`"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **_FIELDS,
        "theta_d_length": _SIZE,
        "save_indices": FieldRule(
            "understood",
            one_of(True),
            "true (the draw from proj_seed cannot be repeated with certainty)",
            "seed_not_usable",
            required=True,
        ),
        "proj_seed": _SEED,
        "unilora_dropout": FRACTION,
        "init_theta_d_bound": _NUMBER,
        "init_weights": FLAG,
    }

    def rank(self, linear: LinearSpec) -> int:
        return int(self.config["r"])

    def shared_layout(self) -> Mapping[str, TensorRule]:
        return {THETA: TensorRule((int(self.config["theta_d_length"]),))}

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        shape_a, shape_b = (self.config["r"], linear.in_features), (linear.out_features, self.config["r"])
        return {
            "unilora_indices_A": TensorRule(shape_a, INDEX_DTYPES),
            "unilora_indices_B": TensorRule(shape_b, INDEX_DTYPES),
            "unilora_scales_A": TensorRule(shape_a),
            "unilora_scales_B": TensorRule(shape_b),
        }

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        self._theta = shared[THETA].float()

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        theta = self._theta
        indices = {}
        for side in "AB":
            index = parts[f"unilora_indices_{side}"].long()
            if not (int(index.min()) >= 0 and int(index.max()) < len(theta)):
                name = f"{PEFT_PREFIX}{linear.name}.unilora_indices_{side}"
                found = f"{int(index.min())}..{int(index.max())}"
                findings.add("index_out_of_range", name, found, f"0..{len(theta) - 1}")
                index = index.clamp(0, len(theta) - 1)
            indices[side] = index
        scales_a, scales_b = parts["unilora_scales_A"].float(), parts["unilora_scales_B"].float()

        def dense() -> Tensor:
            """Gathered by ``take`` over the flat indices, in float64."""
            a = theta.double().take(indices["A"]) * scales_a
            return ((theta.double().take(indices["B"]) * scales_b) @ a).float()

        return LoraDelta(linear.name, theta[indices["A"]] * scales_a, theta[indices["B"]] * scales_b, 1.0, dense=dense)


class TinyLora(PeftReader):
    peft_type = "TINYLORA"
    title = "TinyLoRA"
    source = "`tinylora_A`, `tinylora_B`, `tinylora_P`; shared `tinylora_v.0`"
    delta = "`B (Σ v_i P_i) A`"
    limits = "several groups (`weight_tying` other than 1.0) and projections left out (`save_projection: false`)"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **_FIELDS,
        "u": _SIZE,
        "weight_tying": FieldRule(
            "understood",
            lambda value: is_fraction(value) and value == 1.0,
            "1.0 (which linears share a vector is not in the file, unless all do)",
            "unsupported_feature",
            required=True,
        ),
        "save_projection": FieldRule(
            "understood",
            one_of(True),
            "true (the draw from projection_seed hangs on the modules' order)",
            "seed_not_usable",
        ),
        "projection_seed": _SEED,
        "tinylora_dropout": FRACTION,
        "init_v_bound": _NUMBER,
        "init_weights": FieldRule("descriptive", one_of(True, False, "uniform"), "true, false or uniform"),
    }

    def rank(self, linear: LinearSpec) -> int:
        return min(int(self.config["r"]), linear.in_features, linear.out_features)

    def shared_layout(self) -> Mapping[str, TensorRule]:
        return {VECTOR: TensorRule((int(self.config["u"]),))}

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = self.rank(linear)
        return {
            "tinylora_A": TensorRule((rank, linear.in_features)),
            "tinylora_B": TensorRule((linear.out_features, rank)),
            "tinylora_P": TensorRule((int(self.config["u"]), rank, rank)),
        }

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        self._vector = shared[VECTOR].float()

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        a, b, projections = (parts[f"tinylora_{name}"].float() for name in "ABP")
        vector = self._vector

        def dense() -> Tensor:
            return b @ (vector[:, None, None] * projections).sum(0) @ a

        return LoraDelta(linear.name, torch.einsum("i,ijk->jk", vector, projections) @ a, b, 1.0, dense=dense)
