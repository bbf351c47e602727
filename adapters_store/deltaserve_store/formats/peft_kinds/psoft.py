"""PEFT PSOFT (Wu et al., ICLR 2026): the r leading directions of the base's weight are turned and scaled.

With ``W = U S V'`` the delta is ``U_r S_r (R - I) V_r'`` (``ab_svd_init: psoft_init``) or ``U_r sqrt(S_r) (R - I)
sqrt(S_r) V_r'`` (``pissa_init``), of rank r; ``psoft_alpha`` cancels out. ``R = diag(b) C diag(a)`` of
``psoft_R.vector_b``, ``vector_a`` [r] and the Cayley transform ``C = (I + Q)(I - Q)^-1`` of the upper triangle
``psoft_R.weight`` [r (r - 1) / 2]; with ``use_cayley_neumann`` a polynomial in its place, without ``psoft_orth`` C is
``psoft_R.weight`` [r, r] itself.

U and V are not in the file: PEFT decomposes the weight again, in float32, when it loads it, and R means something only
for the signs that LAPACK then gives them. So it is done here, and refused where this build gives other signs than the
build that the reader was written with, or where singular values hardly differ. What nobody can tell from the file is
whether training had these signs: a base that lay on a GPU when the adapter was made may have had others, and PEFT on a
CPU then answers as is served here, other than in training. Source: peft 0.21, ``tuners/psoft/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaserve_store.findings import Findings, refuse
from deltaserve_store.formats.conversion_cost import svd_flops
from deltaserve_store.formats.peft_fields import (
    ALPHA,
    COMMON_FIELDS,
    FLAG,
    FRACTION,
    INTEGER,
    RANK,
    SELECTION_FIELDS,
    FieldRule,
    is_bool,
    is_int,
    one_of,
)
from deltaserve_store.formats.peft_kinds.cayley import MAX_TERMS, cayley, cayley_change, check_orthogonal, series_change
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.parsed import FunctionDelta, LoraDelta
from deltaserve_store.spec import LinearSpec

SMALLEST_GAP = 3e-5
"""Of the largest singular value: directions of nearer ones mix by a percent in float32 from one machine to the next."""
_KNOWN_SIGNS = ("-+++-+++-+--", "-++++-++--++", "+--++-+-+++-", "---+++++----")
"""Of matrices 64 x 64, 40 x 96, 96 x 40 and 200 x 40."""
_SWITCH = FieldRule("understood", is_bool, "true or false", required=True)
_NOTE = (
    "PSOFT: its file does not say which signs the base's singular vectors had in training; served with those that PEFT "
    "computes on a CPU"
)


def _is_length(value: Any) -> bool:
    return value is None or (isinstance(value, float) and 0 < value < 1)


class Psoft(PeftReader):
    peft_type = "PSOFT"
    title = "PSOFT"
    source = "`psoft_R.weight`, `psoft_R.vector_a`, `psoft_R.vector_b`"
    delta = "`U S (R - I) Vᵀ` of the base's leading singular vectors"
    limits = (
        "singular values that hardly differ, and builds whose LAPACK gives singular vectors other signs "
        "(`seed_not_usable`); `psoft_svd: lowrank`"
    )
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **SELECTION_FIELDS,
        "r": RANK,
        "psoft_alpha": FieldRule("descriptive", ALPHA.accepts, ALPHA.allowed),
        "psoft_orth": _SWITCH,
        "psoft_mag_a": _SWITCH,
        "psoft_mag_b": _SWITCH,
        "ab_svd_init": FieldRule(
            "understood", one_of("psoft_init", "pissa_init"), "psoft_init or pissa_init", required=True
        ),
        "psoft_svd": FieldRule(
            "understood",
            one_of("full"),
            "full (lowrank finds directions that hang on a random start)",
            "unsupported_feature",
        ),
        "psoft_svd_lowrank_niter": INTEGER,
        "random_seed": INTEGER,
        "use_cayley_neumann": _SWITCH,
        "num_cayley_neumann_terms": FieldRule(
            "understood", lambda value: is_int(value) and 1 <= value <= MAX_TERMS, f"1 to {MAX_TERMS}", required=True
        ),
        "cayley_neumann_eps": FieldRule("understood", _is_length, "null or a number between 0 and 1"),
        "psoft_dropout": FRACTION,
        "init_weights": FLAG,
    }
    notes = (_NOTE,)

    def check(self, findings: Findings) -> None:
        for linear in self.linears:
            limit = linear.narrow
            if self.config["r"] > limit:
                allowed = f"at most {limit}, the narrower side of {linear.name}"
                findings.add("rank_out_of_range", f"{self.where}:r", self.config["r"], allowed)
        if not is_known_decomposition():
            allowed = "a build of PyTorch whose LAPACK gives singular vectors the signs that PEFT meant"
            findings.add("seed_not_usable", self.where, "singular vectors of the base", allowed)

    def rank(self, linear: LinearSpec) -> int:
        return int(self.config["r"])

    def flops(self, linear: LinearSpec) -> float:
        return svd_flops(linear.out_features, linear.in_features)

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = int(self.config["r"])
        shape = (rank * (rank - 1) // 2,) if self.config["psoft_orth"] else (rank, rank)
        rules = {"psoft_R.weight": TensorRule(shape)}
        for side in "ab":
            if self.config[f"psoft_mag_{side}"]:
                rules[f"psoft_R.vector_{side}"] = TensorRule((rank,))
        return rules

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> FunctionDelta:
        rank, is_even = int(self.config["r"]), self.config["ab_svd_init"] == "pissa_init"
        name = f"{PEFT_PREFIX}{linear.name}.psoft_R.weight"
        change, turned = self._change(parts, name, findings)

        def made(weight: Tensor, change: Tensor) -> Tensor:
            """B ``[out, r]`` over A' ``[in, r]``."""
            left, sizes, right = leading_directions(weight, rank, linear.name)
            roots = sizes.sqrt()
            if is_even:
                return torch.cat([left * roots, ((change.double() * roots) @ right).t()]).float()
            return torch.cat([left * sizes, (change.double() @ right).t()]).float()

        def term(both: Tensor, dense: Callable[[], Tensor]) -> LoraDelta:
            b, a = both.split([linear.out_features, linear.in_features])
            return LoraDelta(linear.name, a.t().contiguous(), b.contiguous(), 1.0, dense=dense)

        def dense(weight: Tensor) -> Tensor:
            """What W does to the directions of its inputs, put back turned, less what was there. Nothing is taken from
            what the term was made of: W is decomposed anew, as PEFT does it, since signs are what LAPACK gives."""
            right = torch.linalg.svd(weight.float(), full_matrices=False).Vh[:rank].double()
            images = weight.double() @ right.t()
            roots = images.norm(dim=0).sqrt() if is_even else torch.ones(rank, dtype=torch.float64)
            return ((images / roots) @ turned @ (roots[:, None] * right) - images @ right).float()

        return FunctionDelta(linear.name, (change.float(),), rank, made, term, dense)

    def _change(self, parts: Mapping[str, Tensor], name: str, findings: Findings) -> tuple[Tensor, Tensor]:
        """``R - I``, and R by another way, float64 ``[r, r]``."""
        rank = int(self.config["r"])
        identity = torch.eye(rank, dtype=torch.float64)
        weight = parts["psoft_R.weight"].double()
        if not self.config["psoft_orth"]:
            change, turned = weight - identity, weight
        else:
            skew = torch.zeros(rank, rank, dtype=torch.float64)
            skew[tuple(torch.triu_indices(rank, rank, 1))] = weight
            skew = skew - skew.t()
            if self.config["use_cayley_neumann"]:
                change, turned = self._series(skew)
            else:
                check_orthogonal(skew, name, findings)
                change, turned = cayley_change(-skew), cayley(-skew)
        outer, inner = (parts.get(f"psoft_R.vector_{side}") for side in "ba")
        ones = torch.ones(rank, dtype=torch.float64)
        outer, inner = (ones if scale is None else scale.double() for scale in (outer, inner))
        scales = outer[:, None] * inner
        return scales * change + (scales - 1) * identity, outer[:, None] * turned * inner

    def _series(self, skew: Tensor) -> tuple[Tensor, Tensor]:
        longest, length = self.config.get("cayley_neumann_eps"), float(skew.norm())
        if longest is not None and length > longest:
            skew = skew * (longest / length)
        change = series_change(skew, self.config["num_cayley_neumann_terms"])
        return change, change + torch.eye(len(skew), dtype=torch.float64)


def leading_directions(weight: Tensor, rank: int, module: str) -> tuple[Tensor, Tensor, Tensor]:
    """U ``[out, r]``, S ``[r]`` and V' ``[r, in]`` of float32 W, computed in float32 as PEFT does, given as float64.

    Raises ``AdapterInvalid`` where singular values leave a direction open.
    """
    left, sizes, right = torch.linalg.svd(weight.float(), full_matrices=False)
    gaps = (sizes[: rank + 1].diff().abs() / sizes[0])[:rank]
    if len(gaps) and not float(gaps.min()) >= SMALLEST_GAP:
        found = f"singular values that differ by {float(gaps.min()):.2g} of the largest"
        raise refuse("seed_not_usable", module, found, f"at least {SMALLEST_GAP:g}, so that directions are determined")
    return left[:, :rank].double(), sizes[:rank].double(), right[:rank].double()


def is_known_decomposition() -> bool:
    """Whether singular vectors have the signs here that they had where the reader was written."""
    return tuple(_signs(*shape) for shape in ((64, 64), (40, 96), (96, 40), (200, 40))) == _KNOWN_SIGNS


def _signs(rows: int, columns: int) -> str:
    """Of the largest entry of each of the first 12 left singular vectors of a fixed matrix."""
    numbers = torch.arange(1, rows * columns + 1, dtype=torch.float64)
    matrix = torch.sin(numbers * numbers / 7).float().view(rows, columns)
    left = torch.linalg.svd(matrix, full_matrices=False).U[:, :12]
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))[0]
    return "".join("+" if value > 0 else "-" for value in largest.tolist())
