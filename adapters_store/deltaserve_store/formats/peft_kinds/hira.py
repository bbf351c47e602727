"""PEFT HiRA (Huang et al., ICLR 2025): the base's weight is multiplied, entry by entry, with a low-rank matrix.

``hira_A [r, in]``, ``hira_B [out, r]``; the delta is ``W o (B A)``, without scaling. It is ``sum_i diag(b_i) W
diag(a_i)``: r more products with the base's weights and no fewer; as a term of its own it has the rank of W. Source:
peft 0.21, ``tuners/hira/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    COMMON_FIELDS,
    FRACTION,
    RANK,
    RANK_PATTERN,
    SELECTION_FIELDS,
    FieldRule,
    one_of,
)
from deltaserve_store.formats.peft_kinds.low_rank import converted
from deltaserve_store.formats.peft_kinds.reader import PeftReader, TensorRule
from deltaserve_store.parsed import FunctionDelta, LoraDelta
from deltaserve_store.spec import LinearSpec


class Hira(PeftReader):
    peft_type = "HIRA"
    title = "HiRA"
    source = "`hira_A`, `hira_B`"
    delta = "`W ∘ (B A)`"
    term = "low rank, rank min(in, out)"
    limits = "an error above the limit, where the rank exceeds the bound"
    fields: ClassVar[Mapping[str, FieldRule]] = {
        **COMMON_FIELDS,
        **SELECTION_FIELDS,
        "r": RANK,
        # PEFT 0.21 takes a pattern and makes every linear of rank r all the same; shapes are held to that.
        "rank_pattern": FieldRule("descriptive", RANK_PATTERN.accepts, RANK_PATTERN.allowed),
        "hira_dropout": FRACTION,
        "init_weights": FieldRule(
            "descriptive", one_of(None, True, False, "gaussian"), "null, true, false or gaussian"
        ),
    }

    def bound(self, linear: LinearSpec) -> int:
        return linear.narrow

    def layout(self, linear: LinearSpec) -> Mapping[str, TensorRule]:
        rank = int(self.config["r"])
        return {
            "hira_A": TensorRule((rank, linear.in_features)),
            "hira_B": TensorRule((linear.out_features, rank)),
        }

    def convert(self, linear: LinearSpec, parts: Mapping[str, Tensor], findings: Findings) -> FunctionDelta:
        a, b = parts["hira_A"].float(), parts["hira_B"].float()

        def term(product: Tensor, dense: Callable[[], Tensor]) -> LoraDelta:
            return converted(linear, product, self.conversion, dense)

        def dense(weight: Tensor) -> Tensor:
            """One direction after the other: the weight scaled on both of its sides."""
            total = weight.new_zeros(weight.shape)
            for row, column in zip(a, b.t(), strict=True):
                total.addcmul_(weight * column[:, None], row[None])
            return total

        return FunctionDelta(linear.name, (b, a), self.conversion.rank_of(linear, linear.narrow), _product, term, dense)


def _product(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return weight * (b @ a)
