"""PEFT BEFT (arXiv:2509.15974): a bias of its own for chosen linears, ``beft_bias`` [1, out], added to their outputs.

Source: peft 0.21, ``tuners/beft/{config,layer}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import COMMON_FIELDS, FLAG, FieldRule
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import Kind
from deltaserve_store.spec import LinearSpec
from deltaserve_store.vector_deltas import VectorDelta


class Beft(PeftReader):
    peft_type = "BEFT"
    title = "BEFT"
    source = "`beft_bias`"
    delta = "none; of the bias `beft_bias`"
    term = "bias"
    limits = "Conv1D"
    kind: ClassVar[Kind] = "vector"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        "init_weights": FLAG,
    }

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        return {"beft_bias": TensorRule((1, linear.out_features))}

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> VectorDelta:
        del findings
        return VectorDelta(linear.name, bias=parts["beft_bias"].flatten())
