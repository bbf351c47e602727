"""PEFT AdaLoRA (Zhang et al., arXiv:2303.10512): ``lora_A [r, in]``, ``lora_E [r, 1]``, ``lora_B [out, r]``.

The delta is ``alpha / (init_r + 1e-5) * B diag(E) A``. ``r`` is ``init_r`` until training has pruned a linear; then
``rank_pattern`` names it with one flag for each of the ``init_r`` directions, and the file holds those that are left.
The divisor stays ``init_r``: pruning does not rescale. A linear without a direction left has tensors of no items, or
none at all, and is left alone. Source: peft 0.21, ``tuners/adalora/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import FLAG, LORA_FIELDS, MAX_RANK, FieldRule, is_int, is_rank, off
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

_TRAINING = FieldRule("descriptive", lambda value: value is None or isinstance(value, int | float), "a number")
_COUNT = FieldRule("descriptive", lambda value: value is None or is_int(value), "null or an integer")


def _is_flags(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= MAX_RANK and all(isinstance(item, bool) for item in value)


class AdaLora(PeftReader):
    peft_type = "ADALORA"
    title = "AdaLoRA"
    source = "`lora_A`, `lora_E`, `lora_B`"
    delta = "`alpha / (init_r + 1e-5) · B diag(E) A`"
    limits = "every linear pruned to rank 0; the features LoRA lacks too"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in LORA_FIELDS.items() if name != "r"},
        "r": _COUNT,
        "init_r": FieldRule(
            "understood", is_rank, f"an integer from 1 to {MAX_RANK}", "rank_out_of_range", required=True
        ),
        "rank_pattern": FieldRule(
            "understood",
            lambda value: (
                value is None or (isinstance(value, dict) and all(_is_flags(item) for item in value.values()))
            ),
            "null or, by module path and .lora_E, one flag for each of the init_r directions",
            per_key=_is_flags,
        ),
        # PEFT's AdaLoRA takes these fields and applies neither.
        "use_rslora": off(False),
        "alpha_pattern": off(None, {}),
        "init_lora_weights": FLAG,
        "target_r": _COUNT,
        "tinit": _COUNT,
        "tfinal": _COUNT,
        "deltaT": _COUNT,
        "total_step": _COUNT,
        "beta1": _TRAINING,
        "beta2": _TRAINING,
        "orth_reg_weight": _TRAINING,
    }

    def check(self, findings: Findings) -> None:
        known = {f"{linear.name}.lora_E" for linear in self.linears}
        for key, flags in (self.config.get("rank_pattern") or {}).items():
            where = f"{self.where}:rank_pattern:{key}"
            if key not in known:
                findings.add("target_not_found", where, key, "a targeted linear of the base, followed by .lora_E")
            elif len(flags) != self.config["init_r"]:
                findings.add("invalid_value", where, f"{len(flags)} flags", f"init_r = {self.config['init_r']} flags")
        if self.linears and all(self.is_left_alone(linear) for linear in self.linears):
            findings.add("rank_out_of_range", f"{self.where}:rank_pattern", "rank 0 everywhere", "some direction left")

    def rank(self, linear: LinearSpec) -> int:
        flags = (self.config.get("rank_pattern") or {}).get(f"{linear.name}.lora_E")
        return int(self.config["init_r"]) if flags is None else sum(flags)

    def is_left_alone(self, linear: LinearSpec) -> bool:
        return self.rank(linear) == 0

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = self.rank(linear)
        return {
            "lora_A": TensorRule((rank, linear.in_features), optional=not rank),
            "lora_E": TensorRule((rank, 1), optional=not rank),
            "lora_B": TensorRule((linear.out_features, rank), optional=not rank),
        }

    def convert(
        self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings
    ) -> LoraDelta | tuple[LoraDelta, ...]:
        if self.is_left_alone(linear):
            return ()
        a, e, b = (parts[name].float() for name in ("lora_A", "lora_E", "lora_B"))
        scaling = self.config["lora_alpha"] / (self.config["init_r"] + 1e-5)
        return LoraDelta(linear.name, a * e, b, scaling, dense=lambda: (b * e.flatten()) @ a * scaling)
