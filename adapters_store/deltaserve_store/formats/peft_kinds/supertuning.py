"""PEFT Super-Tuning (arXiv:2607.09287): the largest (or smallest) base weights are trained, at flat positions.

``supertuning_indices [n]`` int32, positions in ``W [out, in]`` row by row, and ``supertuning_values [n]``, with
``n = int(out * in * (1 - sparsity))``. The delta is those entries. Where PEFT left the positions out
(``save_precomputed_indices: false``) they would have to be chosen again by the magnitude of the base's weights, which
ties and another dtype of the base decide otherwise. Source: peft 0.21, ``tuners/supertuning/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import COMMON_FIELDS, FLAG, FRACTION, FieldRule, is_fraction, off, one_of
from deltaserve_store.formats.peft_kinds.reader import INDEX_DTYPES, PeftReader, TensorRule
from deltaserve_store.formats.sparse_entries import sort_entries
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import Kind, SparseDelta
from deltaserve_store.spec import LinearSpec


class SuperTuning(PeftReader):
    peft_type = "SUPERTUNING"
    title = "Super-Tuning"
    kind: ClassVar[Kind] = "sparse"
    source = "`supertuning_indices`, `supertuning_values`"
    delta = "entries at their positions"
    term = "sparse"
    limits = "`r` (its hybrid with LoRA, two terms on one linear); files without the positions"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        "sparsity": FieldRule(
            "understood", lambda value: is_fraction(value) and value < 1, "a number from 0, below 1", required=True
        ),
        "save_precomputed_indices": FieldRule(
            "understood", one_of(True), "true (the positions must be in the file)", "seed_not_usable"
        ),
        "select_top": FLAG,
        "r": off(None),
        "lora_alpha": off(None),
        "lora_dropout": FRACTION,
        "init_weights": FLAG,
    }

    def _count(self, linear: LinearSpec) -> int:
        return int(linear.out_features * linear.in_features * (1 - self.config["sparsity"]))

    def check(self, findings: Findings) -> None:
        for linear in self.linears:
            if self._count(linear) < 1:
                allowed = f"a share that leaves {linear.name} an entry"
                findings.add("invalid_value", f"{self.where}:sparsity", self.config["sparsity"], allowed)

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        count = self._count(linear)
        return {
            "supertuning_indices": TensorRule((count,), INDEX_DTYPES),
            "supertuning_values": TensorRule((count,)),
        }

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> SparseDelta:
        flat, values = parts["supertuning_indices"].long(), parts["supertuning_values"]
        name, size = f"{PEFT_PREFIX}{linear.name}.supertuning_indices", linear.out_features * linear.in_features
        if not (int(flat.min()) >= 0 and int(flat.max()) < size):
            findings.add("index_out_of_range", name, f"{int(flat.min())}..{int(flat.max())}", f"0..{size - 1}")
            flat = flat.clamp(0, size - 1)
        rows, cols = flat // linear.in_features, flat % linear.in_features
        rows, cols, values, num_duplicates = sort_entries(rows, cols, values, linear.in_features)
        if num_duplicates and not findings:
            findings.add("duplicate_index", name, f"{num_duplicates} positions twice", "each position once")
        return SparseDelta(linear.name, rows, cols, values)
