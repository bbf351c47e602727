"""Packed low-rank factors in the format of sums: what ``adapter.json`` says of them, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deltaserve_store.findings import Findings
from deltaserve_store.formats.tensor_checks import check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.packed_factors import BITS, SPANS, PackedFactors, packed_sizes
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec

PARTS = ("codes", "scales")
ALLOWED = (
    '{"ranks": {bits: number of directions}, "span": numbers to a scale}, '
    f"bits some of {', '.join(map(str, BITS))}, span one of {', '.join(map(str, SPANS))}"
)


def told_of(packed: PackedFactors) -> dict[str, Any]:
    """What ``adapter.json`` says of them."""
    return {"ranks": {str(bits): rank for bits, rank in packed.ranks.items()}, "span": packed.span}


def packed_shapes(
    told: Any, linear: LinearSpec, where: str, max_rank: int, findings: Findings
) -> dict[str, tuple[int, ...]]:
    """The shapes of both parts; empty, with a finding, when no factors can be what is told. ``max_rank``: directions
    that there may be."""
    if not isinstance(told, dict) or set(told) != {"ranks", "span"}:
        findings.add("invalid_value", where, told, ALLOWED)
        return {}
    ranks, span = told["ranks"], told["span"]
    words = {str(bits) for bits in BITS}
    if not isinstance(ranks, dict) or not ranks or not set(ranks) <= words:
        findings.add("invalid_value", f"{where}:ranks", ranks, ALLOWED)
        return {}
    if type(span) is not int or span not in SPANS:
        findings.add("invalid_value", f"{where}:span", span, ALLOWED)
        return {}
    if not all(type(rank) is int and rank >= 1 for rank in ranks.values()) or sum(ranks.values()) > max_rank:
        allowed = f"1 or more directions for each number of bits, {max_rank} together"
        findings.add("rank_out_of_range", f"{where}:ranks", ranks, allowed)
        return {}
    num_codes, num_scales = packed_sizes(_shape(linear), _ranks(told), span)
    return {"codes": (num_codes,), "scales": (num_scales,)}


def read_packed(
    told: Mapping[str, Any], linear: LinearSpec, beside: LoraDelta | None, tensors: TensorFile, findings: Findings
) -> LoraDelta | None:
    """One low-rank delta of the packed directions and of those that are stored plainly ``beside`` them. It carries the
    definition of the packed ones (``PackedFactors.dense``) for the proof. None after a finding."""
    module = linear.name
    codes, scales = (tensors.read(f"{module}.{part}") for part in PARTS)
    packed = PackedFactors(module, _shape(linear), _ranks(told), told["span"], codes, scales)
    if packed.spills():
        findings.add("index_out_of_range", f"{module}.codes", "a bit past the last number of a row", "bits of numbers")
        return None
    if not check_values(f"{module}.scales", scales, findings):
        return None
    a, b = packed.factors()
    if not (check_values(f"{module}.scales", a, findings) and check_values(f"{module}.scales", b, findings)):
        return None
    if beside is None:
        return LoraDelta(module, a, b, 1.0, dense=packed.dense)
    plain_a, plain_b = beside.a.float(), beside.b.float()
    a, b = torch.cat([plain_a, a]), torch.cat([plain_b, b], dim=1)
    return LoraDelta(module, a, b, 1.0, dense=lambda: packed.dense() + plain_b @ plain_a)


def _shape(linear: LinearSpec) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _ranks(told: Mapping[str, Any]) -> dict[int, int]:
    return {int(bits): rank for bits, rank in told["ranks"].items()}
