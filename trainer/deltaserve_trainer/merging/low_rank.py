"""Products ``b @ a`` that are never formed: sums, norms, inner products and truncation of low-rank matrices.

``a`` [rank, in], ``b`` [out, rank]. Everything is computed in float64, so that what is lost is the truncation's and not
the arithmetic's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """The matrix ``b @ a`` [out, in]."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def max_rank(self) -> int:
        """Above this rank the factors say nothing that fewer could not."""
        return min(self.a.shape[1], self.b.shape[0])

    def dense(self) -> Tensor:
        return self.b.float() @ self.a.float()


def concatenated(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """``sum(weight * b @ a)``, exactly: the factors side by side, the weights inside ``b``."""
    a = torch.cat([factors.a.float() for _, factors in parts])
    b = torch.cat([weight * factors.b.float() for weight, factors in parts], dim=1)
    return Factors(a, b)


def inner(one: Factors, other: Factors) -> float:
    """``<b1 a1, b2 a2> = sum((b1' b2) * (a1 a2'))``."""
    left = one.b.double().t() @ other.b.double()
    right = one.a.double() @ other.a.double().t()
    return float((left * right).sum())


def norm(factors: Factors) -> float:
    """Frobenius norm, from the triangles of two QR decompositions: no cancellation, unlike the inner product."""
    return float(torch.linalg.matrix_norm(_core(factors)[2]))


def is_nothing(factors: Factors) -> bool:
    """Whether the product is rounding and nothing else."""
    bound = 1e-6 * torch.linalg.matrix_norm(factors.a.double()) * torch.linalg.matrix_norm(factors.b.double())
    return norm(factors) <= float(bound)


def relative_error(stored: Factors, meant: Factors) -> float:
    """``|stored - meant| / |meant|``."""
    size = norm(meant)
    difference = concatenated64([(1.0, stored), (-1.0, meant)])
    return norm(difference) / size if size else 0.0


def concatenated64(parts: Sequence[tuple[float, Factors]]) -> Factors:
    a = torch.cat([factors.a.double() for _, factors in parts])
    b = torch.cat([weight * factors.b.double() for weight, factors in parts], dim=1)
    return Factors(a, b)


def truncated(factors: Factors, rank: int) -> Factors:
    """The nearest matrix of at most ``rank`` (Eckart and Young), its singular values split evenly over both factors."""
    q_b, q_a, core = _core(factors)
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    root = s[:rank].sqrt()
    return Factors((root[:, None] * (v[:rank] @ q_a.t())).float(), ((q_b @ u[:, :rank]) * root).float())


def nearest(matrix: Tensor, rank: int) -> Factors:
    """The nearest matrix of at most ``rank`` to a dense one [out, in]."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return Factors((root[:, None] * v[:rank]).float().contiguous(), (u[:, :rank] * root).float().contiguous())


def _core(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """``b @ a = q_b @ core @ q_a'`` with orthonormal columns in ``q_b`` [out, k] and ``q_a`` [in, l]."""
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().t())
    return q_b, q_a, r_b @ r_a.t()
