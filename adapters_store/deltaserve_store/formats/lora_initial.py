"""PEFT LoRA that took a part out of the base before training: PiSSA (Meng et al., arXiv:2404.02948), OLoRA (Büyükakyüz,
arXiv:2406.01775).

Training ran on ``W - W_0`` with ``W_0 = scaling * B_0 A_0``, so on the base itself the delta is ``scaling * B A -
W_0``, of rank 2 r. ``W_0`` is not in the file, but it follows from W, whatever signs the decomposition chose: of PiSSA
it is the nearest matrix of rank r to W, of OLoRA the part of W inside the span of its first r columns, times scaling (Q
and R are taken as they are). PEFT computes it anew too when it loads such a file. Where the r-th singular value hardly
differs from the next one, or the columns hardly are independent, ``W_0`` hangs on rounding, and the file is refused.
The other methods that change the base draw random numbers (``pissa_niter_n``), look at data (CorDA, LoRA-GA) or
quantise (LoftQ): only PEFT's own export can save them. Source: peft 0.21, ``tuners/lora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.findings import Findings, refuse
from deltaserve_store.formats.conversion_cost import MAX_FLOPS, check_flops, qr_flops, svd_flops
from deltaserve_store.formats.peft_fields import MAX_RANK
from deltaserve_store.parsed import LoraDelta, ResidualDelta
from deltaserve_store.spec import BaseSpec

RECOMPUTED = ("pissa", "olora")
KASA = "kasa"
_SAVED_OTHERWISE = "save with path_initial_model_for_weight_conversion, or upload the initial factors too"
_SMALLEST_GAP = 1e-5
"""Of the largest singular value: nearer ones, or columns nearer to each other's span, leave W_0 open."""


def check_initial(config: Mapping[str, Any], where: str, findings: Findings) -> str | None:
    """The method whose part of the base has to be computed, None for a plain LoRA."""
    method = config.get("init_lora_weights")
    if method not in RECOMPUTED:
        return None
    if config.get("use_dora"):
        findings.add("unsupported_feature", f"{where}:use_dora", True, f"false with {method}")
    if method == "olora" and config.get("fan_in_fan_out"):
        allowed = "linears stored as [out, in]: PEFT's OLoRA takes the columns as they are stored"
        findings.add("unsupported_feature", f"{where}:init_lora_weights", method, allowed)
    return str(method)


def check_ranks(
    method: str, ranks: Mapping[str, int], base: BaseSpec, where: str, findings: Findings, max_flops: float = MAX_FLOPS
) -> None:
    """``ranks`` by module. A part of the base has no more directions than its linear, KaSA leaves one, and less that
    part the delta has twice the rank. And the parts of all linears must be found in ``max_flops`` operations."""
    for module, rank in ranks.items():
        smaller = base.linears[module].narrow
        limit = min(smaller - (method == KASA), MAX_RANK // 2)
        if rank > limit:
            allowed = f"at most {limit}: {module} has {smaller} directions, and the delta twice the rank"
            findings.add("rank_out_of_range", where, rank, allowed)
    cost = qr_flops if method == "olora" else svd_flops
    linears = [base.linears[module] for module in ranks]
    total = sum(cost(linear.out_features, linear.in_features) for linear in linears)
    check_flops(total, max_flops, where, "target fewer linears" if method == KASA else _SAVED_OTHERWISE, findings)


def residual_delta(delta: LoraDelta, method: str) -> ResidualDelta:
    """``delta`` as the file has it, on the base that it was trained beside."""
    rank = delta.rank
    part, dense_part = _METHODS[method]
    share = delta.scaling if method == "olora" else 1.0

    def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
        right, left, gap = part(weight.double(), rank)
        if gap < _SMALLEST_GAP:
            allowed = f"at least {_SMALLEST_GAP:g} of the largest"
            if method != KASA:
                allowed += f" ({_SAVED_OTHERWISE})"
            raise refuse("seed_not_usable", delta.module, f"{method} part of the base, left open by {gap:.2g}", allowed)
        return right, left * share

    def dense(weight: Tensor) -> Tensor:
        taken = share * dense_part(weight.double(), rank)
        return (delta.scaling * (delta.b.double() @ delta.a.double()) - taken).float()

    return ResidualDelta(delta.module, delta.a, delta.b, delta.scaling, factors, dense)


Part = Callable[[Tensor, int], tuple[Tensor, Tensor, float]]
"""``(W float64, r)`` -> right ``[r, in]`` and left ``[out, r]`` float32, and how well they are determined, 0..1."""


def _leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    root = sizes[:rank].sqrt()
    following = float(sizes[rank]) if rank < len(sizes) else 0.0
    gap = (float(sizes[rank - 1]) - following) / float(sizes[0])
    return (root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float(), gap


def _dense_leading(weight: Tensor, rank: int) -> Tensor:
    """Through the eigenvectors of the smaller product of W with itself."""
    if weight.shape[0] < weight.shape[1]:
        return _dense_leading(weight.t(), rank).t()
    basis = torch.linalg.eigh(weight.t() @ weight).eigenvectors[:, -rank:]
    return weight @ basis @ basis.t()


def _first_columns(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    left, right = torch.linalg.qr(weight)
    sizes = right.diagonal()[:rank].abs()
    return right[:rank].float(), left[:, :rank].float(), float(sizes.min() / sizes.max())


def _dense_first_columns(weight: Tensor, rank: int) -> Tensor:
    """The columns of W fitted by the first r of them."""
    first = weight[:, :rank]
    return first @ torch.linalg.lstsq(first, weight).solution


def _trailing(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    gap = float(sizes[-rank - 1] - sizes[-rank]) / float(sizes[0])
    return (sizes[-rank:, None] * right[-rank:]).float(), left[:, -rank:].float(), gap


def _dense_trailing(weight: Tensor, rank: int) -> Tensor:
    """W less its leading part, which the other way finds."""
    return weight - _dense_leading(weight, min(weight.shape) - rank)


_METHODS: dict[str, tuple[Part, Callable[[Tensor, int], Tensor]]] = {
    "pissa": (_leading, _dense_leading),
    "olora": (_first_columns, _dense_first_columns),
    KASA: (_trailing, _dense_trailing),
}
