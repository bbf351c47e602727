"""PEFT UniLoRA (Li et al., arXiv:2506.00799): one trained vector, spread over A and B of all linears.

``base_model.unilora_theta_d [d]`` holds every trained number; ``A = theta[I_A] * s_A [r, in]``, and B likewise ``[out,
r]``. Indices and scales are in the file (``unilora_indices_A``, ``unilora_scales_A``, ...) with ``save_indices``;
otherwise, as PEFT has it by default, numpy draws the indices from ``proj_seed``: one balanced draw for A and then B of
each targeted linear, in the order in which the model registers them, and the scale is ``1 / sqrt(n)`` of a number used
n times. Scales are float32 here; PEFT rounds them to the dtype of the base that it finds. Source: peft 0.21,
``tuners/unilora/{layer,model}.py``.
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
    LAYER_FIELDS,
    LENGTH,
    NUMBER,
    RANK,
    SEED,
    SWITCH,
    FieldRule,
)
from deltaserve_store.formats.peft_kinds.draws import balanced_draw, check_order, is_known_shuffle
from deltaserve_store.formats.peft_kinds.reader import INDEX_DTYPES, PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

THETA = "base_model.unilora_theta_d"
DEFAULT_SEED = 42
MAX_DRAWN = 1 << 27
"""Numbers of A and B of all linears that are drawn: more would take gigabytes while the file is read."""


class UniLora(PeftReader):
    peft_type = "UNILORA"
    title = "UniLoRA"
    source = (
        "shared `unilora_theta_d`; `unilora_indices_A`, `_B`, `unilora_scales_A`, `_B`, or their seed (PEFT's default)"
    )
    delta = "`(theta[I_B] ∘ s_B) (theta[I_A] ∘ s_A)`"
    limits = (
        f"a seed (`save_indices: false`) where the numpy of this build shuffles otherwise (`seed_not_usable`), or for "
        f"more than {MAX_DRAWN} numbers of A and B"
    )
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **LAYER_FIELDS,
        "r": RANK,
        "bias": BIAS,
        "theta_d_length": LENGTH,
        "save_indices": SWITCH,
        "proj_seed": SEED,
        "unilora_dropout": FRACTION,
        "init_theta_d_bound": NUMBER,
        "init_weights": FLAG,
    }

    def _is_saved(self) -> bool:
        return bool(self.config.get("save_indices", False))

    def _sizes(self, linear: LinearSpec) -> tuple[int, int]:
        """Numbers of A and of B."""
        return self.config["r"] * linear.in_features, self.config["r"] * linear.out_features

    def check(self, findings: Findings) -> None:
        if self._is_saved():
            return
        check_order(self, "save_indices", findings)
        place = f"{self.where}:proj_seed"
        if not is_known_shuffle():
            allowed = "indices in the file (save_indices=True): the numpy of this build shuffles otherwise"
            findings.add("seed_not_usable", place, "a seed", allowed)
        count = sum(sum(self._sizes(linear)) for linear in self.linears)
        if count > MAX_DRAWN:
            allowed = f"at most {MAX_DRAWN}, or indices in the file (save_indices=True)"
            findings.add("seed_not_usable", place, f"{count} numbers to draw", allowed)

    def rank(self, linear: LinearSpec) -> int:
        return int(self.config["r"])

    def shared_layout(self) -> Mapping[str, TensorRule]:
        return {THETA: TensorRule((int(self.config["theta_d_length"]),))}

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        if not self._is_saved():
            return {}
        shape_a, shape_b = (self.config["r"], linear.in_features), (linear.out_features, self.config["r"])
        return {
            "unilora_indices_A": TensorRule(shape_a, INDEX_DTYPES),
            "unilora_indices_B": TensorRule(shape_b, INDEX_DTYPES),
            "unilora_scales_A": TensorRule(shape_a),
            "unilora_scales_B": TensorRule(shape_b),
        }

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        self._theta = shared[THETA].float()
        if self._is_saved():
            return
        sizes = {linear.name: self._sizes(linear) for linear in self.linears}
        length, seed = len(self._theta), self.config.get("proj_seed", DEFAULT_SEED)
        drawn = balanced_draw(sum(map(sum, sizes.values())), length, seed)
        self._weights = torch.bincount(drawn, minlength=length).float().rsqrt()
        pieces = drawn.split([size for name in self.registered for size in sizes[name]])
        self._drawn = {name: pieces[2 * i : 2 * i + 2] for i, name in enumerate(self.registered)}

    def _factors(self, linear: LinearSpec, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices, then scales, of A ``[r, in]`` and B ``[out, r]``."""
        if self._is_saved():
            indices_a, indices_b = (parts[f"unilora_indices_{side}"].long() for side in "AB")
            return indices_a, indices_b, parts["unilora_scales_A"].float(), parts["unilora_scales_B"].float()
        drawn_a, drawn_b = self._drawn[linear.name]
        indices_a = drawn_a.long().view(self.config["r"], linear.in_features)
        indices_b = drawn_b.long().view(linear.out_features, self.config["r"])
        return indices_a, indices_b, self._weights[indices_a], self._weights[indices_b]

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> LoraDelta:
        theta = self._theta
        *indices, scales_a, scales_b = self._factors(linear, parts)
        for place, side in enumerate("AB"):
            index = indices[place]
            if not (int(index.min()) >= 0 and int(index.max()) < len(theta)):
                name = f"{PEFT_PREFIX}{linear.name}.unilora_indices_{side}"
                found = f"{int(index.min())}..{int(index.max())}"
                findings.add("index_out_of_range", name, found, f"0..{len(theta) - 1}")
                indices[place] = index.clamp(0, len(theta) - 1)
        of_a, of_b = indices

        def dense() -> Tensor:
            """Gathered by ``take`` over the flat indices, in float64."""
            a = theta.double().take(of_a) * scales_a
            return ((theta.double().take(of_b) * scales_b) @ a).float()

        return LoraDelta(linear.name, theta[of_a] * scales_a, theta[of_b] * scales_b, 1.0, dense=dense)
