"""What a proof measured. Stored beside the version, so that a claim about an adapter can be looked up later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class ProofKey:
    """For what a proof holds. With another key the version is proven again before it is served.

    ``device`` is its kind ("cpu", "cuda"); ``operators`` names the operators and their version.
    """

    base_fingerprint: str
    dtype: str
    device: str
    operators: str
    fold_version: int

    def __str__(self) -> str:
        return f"{self.base_fingerprint}-{self.dtype}-{self.device}-{self.operators}-fold{self.fold_version}"


@dataclass(frozen=True, slots=True)
class Evidence:
    """Logits are compared at ``num_tokens`` positions over the whole vocabulary.

    ``effect``: max |folded with adapter - folded base|, both float32: what the adapter changes at all.
    ``max_error``: max |engine with adapter - folded with adapter|, must not exceed ``tolerance``.
    ``base_error``: max |engine base - folded base|, None where the tolerance does not need it (float32).
    ``logits_rms``: root mean square of the folded logits with adapter. ``greedy_agreement``: share of positions, 0..1,
    where engine and folded weights agree on the most likely token. ``seconds``: what the proof took.
    """

    version: str
    base_fingerprint: str
    dtype: str
    device: str
    operators: str
    fold_version: int
    num_tokens: int
    effect: float
    max_error: float
    tolerance: float
    base_error: float | None
    logits_rms: float
    greedy_agreement: float
    seconds: float

    @property
    def key(self) -> ProofKey:
        return ProofKey(self.base_fingerprint, self.dtype, self.device, self.operators, self.fold_version)

    @property
    def is_within_tolerance(self) -> bool:
        return self.max_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evidence | None:
        """None when the data is not an evidence of this form: the version is then proven again."""
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            return None
        return cls(**data)
