"""What converting an adapter costs, told from shapes before anything is made of its file.

Small files may ask for much: a vector becomes factors of rank 1024, a triangle of numbers a decomposition of every
weight of the base. Counts of operations are those of the textbook (Golub and Van Loan, Matrix Computations, 4th ed.,
sections 3.2, 5.2 and 8.6), for one conversion; the proof takes its own formula from there a few times more.
"""

from __future__ import annotations

from deltaserve_store.findings import Findings

MAX_FLOPS = 2e15
"""Of all decompositions of one adapter: a little more than those of every linear of a base of 32 billion weights."""


def svd_flops(rows: int, columns: int) -> float:
    """Singular values and the vectors of the narrower side's number of directions."""
    narrow, wide = sorted((rows, columns))
    return 6.0 * wide * narrow**2 + 20.0 * narrow**3


def svd_values_flops(rows: int, columns: int) -> float:
    """Singular values alone."""
    narrow, wide = sorted((rows, columns))
    return 2.0 * wide * narrow**2 + 2.0 * narrow**3


def qr_flops(rows: int, columns: int) -> float:
    """Both factors, of the narrower side's number of directions."""
    narrow, wide = sorted((rows, columns))
    return 4.0 * wide * narrow**2


def solve_flops(size: int, columns: int) -> float:
    """A square system with ``columns`` right sides."""
    return 2.0 / 3.0 * size**3 + 2.0 * size**2 * columns


def check_flops(total: float, limit: float, where: str, instead: str, findings: Findings) -> None:
    """Decompositions of more than ``limit`` operations together are a finding; ``instead``: what needs fewer."""
    if total > limit:
        found = f"decompositions of {total:.3g} operations together"
        allowed = f"at most {limit:.3g}: {instead}, or serve with more --conversion-flops"
        findings.add("conversion_too_large", where, found, allowed)
