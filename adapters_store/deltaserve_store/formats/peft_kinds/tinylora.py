"""PEFT TinyLoRA (arXiv:2602.04118): few trained numbers, spread over A and B by frozen tensors.

``B R A`` with singular vectors of the base in ``tinylora_A [r, in]``, ``tinylora_B [out, r]``, and ``R = sum_i v_i
P_i`` of ``tinylora_P [u, r, r]`` and ``base_model.tinylora_v.<group> [u]``. Groups are stretches of ``max(1, n //
groups)`` of the n targeted linears, in the order in which the model registers them; ``groups = round(n (1 -
weight_tying))``, at least 1, and the last one takes the rest. With ``save_projection: false`` P is drawn from
``projection_seed`` plus the linear's number in that order, normal with a variance of ``1 / r``. Source: peft 0.21,
``tuners/tinylora/{layer,model}.py``.
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
    LAYER_FIELDS,
    LENGTH,
    NUMBER,
    RANK,
    SWITCH,
    FieldRule,
    is_fraction,
    is_int,
    one_of,
)
from deltaserve_store.formats.peft_kinds.draws import check_order, is_known_normal
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

VECTOR = "base_model.tinylora_v"
DEFAULT_SEED = 42
MAX_DRAWN = 1 << 27
"""Numbers of P of all linears that are drawn: more would take gigabytes while the file is read."""


class TinyLora(PeftReader):
    peft_type = "TINYLORA"
    title = "TinyLoRA"
    source = "`tinylora_A`, `tinylora_B`, `tinylora_P` or its seed; shared `tinylora_v.<group>`"
    delta = "`B (Σ v_i P_i) A`"
    limits = (
        "a seed (`save_projection: false`) where the generator of this build draws other numbers (`seed_not_usable`), "
        f"or for more than {MAX_DRAWN} numbers of P"
    )
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **LAYER_FIELDS,
        "r": RANK,
        "bias": BIAS,
        "u": LENGTH,
        "weight_tying": FieldRule("understood", is_fraction, "a number from 0 to 1"),
        "save_projection": SWITCH,
        "projection_seed": FieldRule(
            "understood", lambda value: is_int(value) and -(1 << 62) <= value < 1 << 62, "an integer of 63 bits"
        ),
        "tinylora_dropout": FRACTION,
        "init_v_bound": NUMBER,
        "init_weights": FieldRule("descriptive", one_of(True, False, "uniform"), "true, false or uniform"),
    }

    def _is_saved(self) -> bool:
        return bool(self.config.get("save_projection", True))

    def _num_groups(self) -> int:
        return max(1, round(len(self.linears) * (1.0 - self.config.get("weight_tying", 0.0))))

    def check(self, findings: Findings) -> None:
        if not self._is_saved():
            check_order(self, "save_projection", findings)
            if not is_known_normal():
                allowed = "projections in the file (save_projection=True): this build draws other numbers from a seed"
                findings.add("seed_not_usable", f"{self.where}:projection_seed", "a seed", allowed)
            count = sum(self.rank(linear) ** 2 for linear in self.linears) * int(self.config["u"])
            if count > MAX_DRAWN:
                allowed = f"at most {MAX_DRAWN}, or projections in the file (save_projection=True)"
                findings.add("seed_not_usable", f"{self.where}:projection_seed", f"{count} numbers to draw", allowed)
        elif self._num_groups() > 1:
            check_order(self, "weight_tying", findings)

    def rank(self, linear: LinearSpec) -> int:
        return min(int(self.config["r"]), linear.narrow)

    def shared_layout(self) -> Mapping[str, TensorRule]:
        return {f"{VECTOR}.{group}": TensorRule((int(self.config["u"]),)) for group in range(self._num_groups())}

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = self.rank(linear)
        rules = {
            "tinylora_A": TensorRule((rank, linear.in_features)),
            "tinylora_B": TensorRule((linear.out_features, rank)),
        }
        if self._is_saved():
            rules["tinylora_P"] = TensorRule((int(self.config["u"]), rank, rank))
        return rules

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        self._vectors = [shared[f"{VECTOR}.{group}"].float() for group in range(self._num_groups())]

    def _group(self, linear: LinearSpec) -> int:
        count = self._num_groups()
        if count == 1:
            return 0
        return min(self.registered.index(linear.name) // max(1, len(self.linears) // count), count - 1)

    def _projections(self, linear: LinearSpec, parts: Mapping[str, Tensor]) -> Tensor:
        """P, float32 ``[u, r, r]``."""
        if self._is_saved():
            return parts["tinylora_P"].float()
        rank = self.rank(linear)
        seed = self.config.get("projection_seed", DEFAULT_SEED) + self.registered.index(linear.name)
        shape = (int(self.config["u"]), rank, rank)
        return torch.normal(0.0, 1.0 / (rank**0.5), shape, generator=torch.Generator().manual_seed(seed))

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        a, b = parts["tinylora_A"].float(), parts["tinylora_B"].float()
        projections, vector = self._projections(linear, parts), self._vectors[self._group(linear)]

        def dense() -> Tensor:
            return b @ (vector[:, None, None] * projections).sum(0) @ a

        return LoraDelta(linear.name, torch.einsum("i,ijk->jk", vector, projections) @ a, b, 1.0, dense=dense)
