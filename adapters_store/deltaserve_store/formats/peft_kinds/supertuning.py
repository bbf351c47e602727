"""PEFT Super-Tuning (arXiv:2607.09287): the largest (or smallest) base weights are trained, at flat positions.

``supertuning_indices [n]`` int32, positions in ``W [out, in]`` row by row, and ``supertuning_values [n]``, with
``n = int(out * in * (1 - sparsity))``. The delta is those entries. Where PEFT left the positions out
(``save_precomputed_indices: false``) they would have to be chosen again by the magnitude of the base's weights, in the
order of ``torch.topk``, which values follow. Between equal magnitudes that order is the build's and the device's own,
and there always are some: 16 bits have 32768 magnitudes, fewer than a linear has entries, and of 40 thousand weights in
float32 within a factor of 2 about a hundred share theirs.

With ``r`` a linear has a LoRA too, ``supertuning_lora_A.weight [r, in]`` and ``supertuning_lora_B.weight [out, r]``,
scaled by ``lora_alpha / r`` (alpha is 2 r unless given). Source: peft 0.21, ``tuners/supertuning/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    ALPHA,
    COMMON_FIELDS,
    FLAG,
    FRACTION,
    MAX_RANK,
    FieldRule,
    is_alpha,
    is_fraction,
    is_rank,
    one_of,
)
from deltaserve_store.formats.peft_kinds.reader import INDEX_DTYPES, PeftReader, TensorRule
from deltaserve_store.formats.sparse_entries import sort_entries
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_store.spec import LinearSpec


class SuperTuning(PeftReader):
    peft_type = "SUPERTUNING"
    title = "Super-Tuning"
    source = "`supertuning_indices`, `supertuning_values`; with `r` also `supertuning_lora_A.weight`, `_B.weight`"
    delta = "entries at their positions; with `r` also `lora_alpha / r · B A`"
    term = "sparse; with `r` also low rank, rank r"
    limits = "files without the positions"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **{name: rule for name, rule in COMMON_FIELDS.items() if name != "fan_in_fan_out"},
        "sparsity": FieldRule(
            "understood", lambda value: is_fraction(value) and value < 1, "a number from 0, below 1", required=True
        ),
        "save_precomputed_indices": FieldRule(
            "understood", one_of(True), "true (the positions must be in the file)", "seed_not_usable"
        ),
        "select_top": FLAG,
        "r": FieldRule(
            "understood",
            lambda value: value is None or is_rank(value),
            f"null or an integer from 1 to {MAX_RANK}",
            "rank_out_of_range",
        ),
        "lora_alpha": FieldRule(
            "understood", lambda value: value is None or is_alpha(value), f"null or {ALPHA.allowed}, with r"
        ),
        "lora_dropout": FRACTION,
        "init_weights": FLAG,
    }

    def _count(self, linear: LinearSpec) -> int:
        return int(linear.out_features * linear.in_features * (1 - self.config["sparsity"]))

    def check(self, findings: Findings) -> None:
        if self.config.get("r") is None and self.config.get("lora_alpha") is not None:
            findings.add("invalid_value", f"{self.where}:lora_alpha", self.config["lora_alpha"], "null without r")
        for linear in self.linears:
            if self._count(linear) < 1:
                allowed = f"a share that leaves {linear.name} an entry"
                findings.add("invalid_value", f"{self.where}:sparsity", self.config["sparsity"], allowed)

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        count, rank = self._count(linear), self.config.get("r")
        rules = {
            "supertuning_indices": TensorRule((count,), INDEX_DTYPES),
            "supertuning_values": TensorRule((count,)),
        }
        if rank is not None:
            rules["supertuning_lora_A.weight"] = TensorRule((rank, linear.in_features))
            rules["supertuning_lora_B.weight"] = TensorRule((linear.out_features, rank))
        return rules

    def rank(self, linear: LinearSpec) -> int | None:
        return self.config.get("r")

    def convert(
        self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings
    ) -> SparseDelta | tuple[SparseDelta | LoraDelta, ...]:
        sparse = self._entries(linear, parts, findings)
        rank = self.config.get("r")
        if rank is None:
            return sparse
        alpha = self.config.get("lora_alpha")
        a, b = parts["supertuning_lora_A.weight"], parts["supertuning_lora_B.weight"]
        return sparse, LoraDelta(linear.name, a, b, (2 * rank if alpha is None else alpha) / rank)

    def _entries(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> SparseDelta:
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
