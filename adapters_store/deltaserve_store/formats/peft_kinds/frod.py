"""PEFT FRoD: the weight is written in a basis that the linears of one role share, and changed there.

``base_model.frod_V.<role>`` [in, in] is the basis. With it ``W = U diag(l) V'``, U with columns of length 1, and the
adapted weight is ``U (S + diag(lambda)) V'``: ``frod_lambda_l`` [in], and S with ``frod_lambda_s_values`` [n] at
``base_model.frod_s_indices.<role>`` [2, n]. So the delta is ``U (S + diag(lambda - l)) V'``, of full rank. A role is
the last two parts of a path, or the last after a number; ``base_model.frod_s_size.<role>`` says the size again. U
follows from W and V, whatever V is: nothing hangs on signs. PEFT rounds U and V to the dtype of its base, so that it
misses a 16-bit base a little even before training; here they are not rounded. Source: peft 0.21,
``tuners/frod/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.conversion_cost import solve_flops, svd_values_flops
from deltaserve_store.formats.peft_fields import (
    BIAS,
    COMMON_FIELDS,
    FLAG,
    FRACTION,
    INTEGER,
    LAYER_FIELDS,
    NUMBER,
    FieldRule,
    is_fraction,
    one_of,
)
from deltaserve_store.formats.peft_kinds.low_rank import converted
from deltaserve_store.formats.peft_kinds.reader import INDEX_DTYPES, PeftReader, TensorRule
from deltaserve_store.parsed import FunctionDelta, LoraDelta
from deltaserve_store.spec import LinearSpec

_SMALLEST = 1e-10
"""Of a basis: its smallest singular value by its largest. Below, U is rounding."""
_NO_COLUMN = 1e-12
"""Lengths in W of a direction that PEFT takes for none."""


class Frod(PeftReader):
    peft_type = "FROD"
    title = "FRoD"
    source = (
        "`frod_lambda_l`, `frod_lambda_s_values`; shared `frod_V.<role>`, `frod_s_indices.<role>`, `frod_s_size.<role>`"
    )
    delta = "`U (S + diag(λ)) Vᵀ - W` with `W = U diag(l) Vᵀ`"
    term = "low rank, rank min(in, out)"
    limits = (
        "bases left out (`save_projection: false`); a basis without an inverse; an error above the limit, where the "
        "rank exceeds the bound"
    )
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **LAYER_FIELDS,
        "sparse_rate": FieldRule("understood", is_fraction, "a number from 0 to 1", required=True),
        "save_projection": FieldRule(
            "understood",
            one_of(True),
            "true (the basis is a decomposition of all layers' weights, which differs from build to build)",
            "seed_not_usable",
        ),
        "projection_prng_key": INTEGER,
        "regularization_alpha": NUMBER,
        "frod_dropout": FRACTION,
        "progressbar": FLAG,
        "runtime_offload_base_weight": FLAG,
        "bias": BIAS,
        "init_weights": FLAG,
    }

    def check(self, findings: Findings) -> None:
        widths: dict[str, int] = {}
        for linear in self.linears:
            if widths.setdefault(role_of(linear.name), linear.in_features) != linear.in_features:
                allowed = f"{widths[role_of(linear.name)]} inputs, as the others of its role"
                findings.add("shape_mismatch", linear.name, f"{linear.in_features} inputs", allowed)

    def bound(self, linear: LinearSpec) -> int:
        return linear.narrow

    def flops(self, linear: LinearSpec) -> float:
        """Beside the best term: U of the weight, and once for a role whether its basis has an inverse."""
        width, role = linear.in_features, role_of(linear.name)
        is_first = next(other for other in self.linears if role_of(other.name) == role) is linear
        own = solve_flops(width, linear.out_features) + (svd_values_flops(width, width) if is_first else 0.0)
        return super().flops(linear) + own

    def _count(self, width: int) -> int:
        """Entries of S."""
        share, others = float(self.config["sparse_rate"]), width * width - width
        count = min(int(width * width * share), others)
        return max(1, count) if share > 0 and others else count

    def shared_layout(self) -> Mapping[str, TensorRule]:
        rules: dict[str, TensorRule] = {}
        for linear in self.linears:
            role, width = role_of(linear.name), linear.in_features
            rules[f"base_model.frod_V.{role}"] = TensorRule((width, width))
            rules[f"base_model.frod_s_indices.{role}"] = TensorRule((2, self._count(width)), INDEX_DTYPES)
            rules[f"base_model.frod_s_size.{role}"] = TensorRule((2,), INDEX_DTYPES)
        return rules

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        return {
            "frod_lambda_l": TensorRule((linear.in_features,)),
            "frod_lambda_s_values": TensorRule((self._count(linear.in_features),)),
        }

    def begin(self, shared: Mapping[str, Tensor], findings: Findings) -> None:
        self._shared = shared
        for role, width in {role_of(linear.name): linear.in_features for linear in self.linears}.items():
            size, places = shared[f"base_model.frod_s_size.{role}"], shared[f"base_model.frod_s_indices.{role}"]
            if size.tolist() != [width, width]:
                place = f"base_model.frod_s_size.{role}"
                findings.add("shape_mismatch", place, str(size.tolist()), str([width, width]))
            if places.numel() and not (int(places.min()) >= 0 and int(places.max()) < width):
                place, found = f"base_model.frod_s_indices.{role}", f"{int(places.min())}..{int(places.max())}"
                findings.add("index_out_of_range", place, found, f"0..{width - 1}")
            basis = shared[f"base_model.frod_V.{role}"].double()
            if not findings:
                sizes = torch.linalg.svdvals(basis)
                if not float(sizes[-1]) > _SMALLEST * float(sizes[0]):
                    found = "columns that depend on each other"
                    findings.add("invalid_value", f"base_model.frod_V.{role}", found, "an invertible matrix")

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> FunctionDelta:
        role, width = role_of(linear.name), linear.in_features
        basis = self._shared[f"base_model.frod_V.{role}"]
        rows, columns = self._shared[f"base_model.frod_s_indices.{role}"].long()
        diagonal, values = parts["frod_lambda_l"].float(), parts["frod_lambda_s_values"].float()

        def made(weight: Tensor, diagonal: Tensor, values: Tensor) -> Tensor:
            images = torch.linalg.solve(basis.double(), weight.double().t()).t()
            lengths = images.norm(dim=0)
            unit = torch.where(lengths > _NO_COLUMN, images / lengths, 0.0)
            core = torch.zeros(width, width, dtype=torch.float64)
            core.index_put_((rows, columns), values.double(), accumulate=True)
            core.diagonal().add_(diagonal.double() - torch.where(lengths > _NO_COLUMN, lengths, 0.0))
            return (unit @ core @ basis.double().t()).float()

        def term(product: Tensor, dense: Callable[[], Tensor]) -> LoraDelta:
            return converted(linear, product, self.conversion, dense)

        def dense(weight: Tensor) -> Tensor:
            """The adapted weight, its sparse part entry by entry, less the base's."""
            images = weight.double() @ torch.linalg.inv(basis.double()).t()
            unit = torch.nn.functional.normalize(images, dim=0, eps=_NO_COLUMN)
            adapted = unit * diagonal
            adapted.index_add_(1, columns, unit[:, rows] * values)
            return (adapted @ basis.double().t() - weight.double()).float()

        return FunctionDelta(
            linear.name, (diagonal, values), self.conversion.rank_of(linear, linear.narrow), made, term, dense
        )


def role_of(path: str) -> str:
    """The name under which PEFT shares a basis."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"
