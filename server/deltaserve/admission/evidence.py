"""What a proof measured. Stored beside the version, so that a claim about an adapter can be looked up later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deltaserve.admission.conversion import Conversion


@dataclass(frozen=True, slots=True)
class ProofKey:
    """For what a proof holds. With another key the version is proven again before it is served.

    ``device`` is its kind ("cpu", "cuda"); ``operators`` names the operators and
    the code they are made of.
    """

    base_fingerprint: str
    dtype: str
    device: str
    operators: str
    fold_version: int

    def __str__(self) -> str:
        return f"{self.base_fingerprint}-{self.dtype}-{self.device}-{self.operators}-fold{self.fold_version}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Logits compared over all probe positions and the whole vocabulary, the adapter applied at ``scale``.

    ``effect``: max |folded with adapter - folded base|, both float32: what the adapter changes at all.
    ``max_error``: max |engine with adapter - folded with adapter|, must not exceed ``tolerance``.
    ``logits_rms``: root mean square of the folded logits with adapter. ``greedy_agreement``: share of positions, 0..1,
    where engine and folded weights agree on the most likely token. ``noise``: max |folded - folded in another
    precision|, measured where the usual tolerance did not hold, and part of ``tolerance`` then.
    """

    scale: float
    effect: float
    max_error: float
    tolerance: float
    logits_rms: float
    greedy_agreement: float
    noise: float | None = None

    @property
    def is_within_tolerance(self) -> bool:
        return self.max_error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Evidence:
    """``plain`` is the adapter as it will be served. ``amplified`` is it at a larger scale, where at scale 1 its effect
    does not stand out from rounding, so that a fault in applying it would not either; None where it does.

    ``base_error``: max |engine base - folded base|, None where the tolerance does not need it (float32). ``seconds``:
    what the proof took. ``conversion``: what it changes that some terms are not their method's delta but the nearest of
    their rank (``plain`` and ``amplified`` then compare with those terms); None where all are exact.
    """

    version: str
    base_fingerprint: str
    dtype: str
    device: str
    operators: str
    fold_version: int
    num_tokens: int
    plain: Comparison
    amplified: Comparison | None
    base_error: float | None
    seconds: float
    conversion: Conversion | None = None

    @property
    def key(self) -> ProofKey:
        return ProofKey(self.base_fingerprint, self.dtype, self.device, self.operators, self.fold_version)

    @property
    def effect(self) -> float:
        return self.plain.effect

    @property
    def max_error(self) -> float:
        return self.plain.max_error

    @property
    def tolerance(self) -> float:
        return self.plain.tolerance

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        return (self.plain,) if self.amplified is None else (self.plain, self.amplified)

    @property
    def is_within_tolerance(self) -> bool:
        is_converted = self.conversion is None or self.conversion.is_within_limit
        return is_converted and all(comparison.is_within_tolerance for comparison in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """With ``effect`` on top, where the store's records look for it."""
        return {**asdict(self), "effect": self.effect}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evidence | None:
        """None when the data is not an evidence of this form: the version is then proven again."""
        values = {name: value for name, value in data.items() if name != "effect"}
        try:
            plain, amplified = Comparison(**values.pop("plain")), values.pop("amplified")
            conversion = Conversion.from_dict(values.pop("conversion", None))
            return cls(plain=plain, amplified=amplified and Comparison(**amplified), conversion=conversion, **values)
        except (KeyError, TypeError):
            return None
