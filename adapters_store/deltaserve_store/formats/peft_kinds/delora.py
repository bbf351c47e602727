"""PEFT DeLoRA (Bini et al., arXiv:2503.18225): normalised directions with one bound for all of them.

``delora_A [r, in]``, ``delora_B [out, r]``, ``delora_lambda [1]`` and ``delora_w_norm [in]``, the norms of the base's
columns as training found them. Direction i has weight ``lambda / r / (|a_i| |b_i|)`` with norms of at least 1e-4, and
inputs are scaled by ``w_norm``. Source: peft 0.21, ``tuners/delora/layer.py``.
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
    RANK,
    RANK_PATTERN,
    SELECTION_FIELDS,
    FieldRule,
)
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

_SMALLEST_NORM = 1e-4


class DeLora(PeftReader):
    peft_type = "DELORA"
    title = "DeLoRA"
    source = "`delora_A`, `delora_B`, `delora_lambda`, `delora_w_norm`"
    delta = "`B diag(lambda / r / (‖a‖ ‖b‖)) A diag(w_norm)`"
    limits = "a file without `delora_w_norm`"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        **SELECTION_FIELDS,
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        # Where training starts; what it came to is in the file.
        "delora_lambda": FieldRule("descriptive", ALPHA.accepts, ALPHA.allowed),
        "lambda_pattern": FieldRule("descriptive", lambda value: value is None or isinstance(value, dict), "an object"),
        "bias": BIAS,
        "module_dropout": FRACTION,
        "init_weights": FLAG,
    }

    def rank(self, linear: LinearSpec) -> int:
        return int(self.patterns("rank_pattern").value_for(linear.name, self.config["r"]))

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = self.rank(linear)
        return {
            "delora_A": TensorRule((rank, linear.in_features)),
            "delora_B": TensorRule((linear.out_features, rank)),
            "delora_lambda": TensorRule((1,)),
            "delora_w_norm": TensorRule((linear.in_features,)),
        }

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        a, b, bound, norms = (parts[f"delora_{name}"].float() for name in ("A", "B", "lambda", "w_norm"))
        size_a = a.norm(dim=1).clamp(min=_SMALLEST_NORM)
        size_b = b.norm(dim=0).clamp(min=_SMALLEST_NORM)

        def dense() -> Tensor:
            """PEFT's forward on every unit vector."""
            hidden = torch.diag(norms) @ a.t() * ((bound / a.shape[0]) / (size_a * size_b))
            return (hidden @ b.t()).t()

        return LoraDelta(linear.name, a / size_a[:, None] * norms, b / size_b * bound, 1 / a.shape[0], dense=dense)
