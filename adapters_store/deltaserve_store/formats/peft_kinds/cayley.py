"""Orthogonal matrices from skew-symmetric ones, and what is common to PEFT types that turn inputs by blocks of them.

Cayley: ``R = (I - Q)(I + Q)^-1`` is orthogonal for every skew-symmetric Q. In float64 here, whatever the file's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import FieldRule, is_int
from deltaserve_store.spec import LinearSpec

MAX_BLOCK = 1024
MAX_TERMS = 64
ORTHOGONAL_WITHIN = 1e-5
"""Of the largest entry of ``R' R - I``."""

SIZE = FieldRule("understood", lambda value: is_int(value) and 0 <= value <= 1 << 24, "0 or above", required=True)


def cayley_change(skew: Tensor) -> Tensor:
    """``R - I = -2 Q (I + Q)^-1`` of float64 Q [..., b, b]: where R is near I, nothing is lost by subtracting it."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return -2 * torch.linalg.solve(identity + skew, skew, left=False)


def cayley(skew: Tensor) -> Tensor:
    """R of float64 Q [..., b, b], as PEFT writes it."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew)
    return torch.linalg.solve(identity + skew, identity - skew, left=False)


def series_change(skew: Tensor, terms: int) -> Tensor:
    """``R - I`` of the polynomial that PEFT takes for ``(I + Q)(I - Q)^-1`` with ``use_cayley_neumann``: the last power
    counts once, the others twice; 4 terms are its 3."""
    changes, power = torch.zeros_like(skew), skew
    factors = {1: (), 2: (2.0,)}.get(terms, (2.0, *[2.0] * max(1, terms - 3), 1.0))
    for factor in factors:
        changes = changes + factor * power
        power = power @ skew
    return changes


def check_orthogonal(skew: Tensor, name: str, findings: Findings) -> None:
    """Q so large that the rotation which PEFT makes of it in float32, and which was trained, is none any more."""
    rotations = cayley(skew.float()).double()
    residual = rotations.transpose(-1, -2) @ rotations - torch.eye(skew.shape[-1], dtype=torch.float64)
    worst = float(residual.abs().max())
    if not worst <= ORTHOGONAL_WITHIN:
        allowed = f"orthogonal within {ORTHOGONAL_WITHIN:g}, as PEFT computes it"
        findings.add("invalid_value", name, f"a rotation that is off by {worst:.3g}", allowed)


def turn_columns(weight: Tensor, rotations: Tensor) -> Tensor:
    """``weight`` [out, n] times the transpose of blocks [n / b or 1, b, b] on the diagonal, in their dtype."""
    blocks = weight.to(rotations.dtype).reshape(len(weight), -1, rotations.shape[-1])
    shared = rotations.expand(blocks.shape[1], -1, -1)
    return torch.einsum("okc,kic->oki", blocks, shared).reshape(weight.shape)


def check_sizes(
    config: dict[str, Any], fields: tuple[str, str], linears: Sequence[LinearSpec], where: str, findings: Findings
) -> None:
    """PEFT wants the size of the blocks or their number, and has only plain linears."""
    given = [field for field in fields if config[field]]
    if len(given) != 1:
        found = f"{fields[0]} {config[fields[0]]}, {fields[1]} {config[fields[1]]}"
        findings.add("invalid_value", f"{where}:{fields[0]}", found, "one of both 0, the other above 0")
    for linear in linears:
        if linear.transposed:
            allowed = "linears stored as [out, in]: PEFT has no others here"
            findings.add("unsupported_target", f"{where}:target_modules", linear.name, allowed)


def check_block(size: int, where: str, findings: Findings) -> None:
    if not 2 <= size <= MAX_BLOCK:
        findings.add("rank_out_of_range", where, f"blocks of {size}", f"blocks of 2 to {MAX_BLOCK}")
