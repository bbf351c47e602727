"""Which adapters may be composed in one request: only those whose deltas add up exactly.

A composition means the base plus the sum of the parts' deltas, each times its strength (task arithmetic). Terms that
are added to a linear's output stack in any number and mixture. Scales and rotations of one side stack
too, ``s = 1 + sum of t_k (s_k - 1)`` and ``R = 1 + sum of (R_k - 1)``: the operators add what each of them changes, so
that a sum of rotations need not be one. A change of inputs and one of outputs on the same linear have no such form, and
are refused, unless one of them is at strength 0. Prefixes follow each other, in the order of the parts. What no rule
speaks of is served alone, at strength 0 or 1: nothing is approximated silently. Probes are not asked: a proof runs one
version, at whatever strength shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaserve.core import Binding
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.deltas.rotation_terms import RotationTerm
from deltaserve.deltas.vector_terms import VectorTerm
from deltaserve.errors import CompositionRefused, Reason


@dataclass(frozen=True, slots=True)
class FamilyRule:
    """``adds``: two such terms have a sum that is served exactly. ``is_switch``: there is nothing between off (0) and
    on (1)."""

    adds: bool
    is_switch: bool


ADDITIVE = FamilyRule(adds=True, is_switch=False)
UNKNOWN = FamilyRule(adds=False, is_switch=True)

RULES: Mapping[str, FamilyRule] = {
    "lora": ADDITIVE,
    "sparse": ADDITIVE,
    "vector": ADDITIVE,
    "rows": ADDITIVE,
    "block": ADDITIVE,
    "dense": ADDITIVE,
    "bottleneck": ADDITIVE,  # modules of one point run in the order of the parts
    "rotation": FamilyRule(adds=True, is_switch=True),
    "prefix": FamilyRule(adds=True, is_switch=True),  # one behind the other, before the prompt
}
"""By family (``FoldedAdapter.kinds``); one that is missing here is ``UNKNOWN``."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What composing looks at of one adapter: its families, and the linears whose inputs or outputs it scales or
    turns."""

    families: tuple[str, ...] = ()
    input_scales: frozenset[str] = frozenset()
    output_scales: frozenset[str] = frozenset()


NO_TRAITS = Traits()


def traits_of(folded: FoldedAdapter) -> Traits:
    inputs: set[str] = set()
    outputs: set[str] = set()
    for linear, terms in folded.terms.items():
        for term in terms:
            if isinstance(term, RotationTerm):
                (inputs if term.side == "input" else outputs).add(linear)
            elif isinstance(term, VectorTerm):
                inputs |= {linear} if term.in_scale is not None else set()
                outputs |= {linear} if term.scale is not None else set()
    return Traits(folded.kinds, frozenset(inputs), frozenset(outputs))


def check_composition(binding: Binding, traits: Sequence[Traits]) -> None:
    """Raises ``CompositionRefused`` with every rule that the parts break; ``traits`` in the order of the parts."""
    parts = binding.parts
    if len(parts) == 1 and parts[0].scale_first == parts[0].scale_last == 1.0:
        return
    reasons: list[Reason] = []
    for index, (part, own) in enumerate(zip(parts, traits, strict=True)):
        where = f"adapters[{index}]"
        rules = {family: RULES.get(family, UNKNOWN) for family in own.families}
        alone = [family for family, rule in rules.items() if not rule.adds]
        if alone and len(parts) > 1:
            found = f"{len(parts)} adapters, of which this one has terms of the kind {', '.join(alone)}"
            reasons.append(Reason("served_alone", where, found, "no other adapter beside these terms"))
        switches = [family for family, rule in rules.items() if rule.is_switch]
        is_whole = part.scale_first == part.scale_last and part.scale_first in (0.0, 1.0)
        if switches and not is_whole:
            found = f"strength {_strength(part.scale_first, part.scale_last)} of the kind {', '.join(switches)}"
            reasons.append(Reason("strength_not_linear", where, found, "strength 0 or 1"))
    is_off = [part.scale_first == part.scale_last == 0.0 for part in parts]
    reasons += _mixed_sides([NO_TRAITS if off else own for off, own in zip(is_off, traits, strict=True)])
    if reasons:
        first = reasons[0]
        raise CompositionRefused(
            f"The adapters cannot be composed: {first.where} has {first.found}; allowed: {first.allowed}.",
            param=f"{first.where}.scale" if first.code == "strength_not_linear" else "adapters",
            reasons=reasons,
        )


def _mixed_sides(traits: Sequence[Traits]) -> list[Reason]:
    """One reason for each pair of which one changes the inputs and the other the outputs of some linear."""
    reasons = []
    for i, one in enumerate(traits):
        for j, other in enumerate(traits):
            both = sorted(one.input_scales & other.output_scales) if i != j else []
            if both:
                more = f" and of {len(both) - 1} more" if len(both) > 1 else ""
                found = f"a change of the inputs of {both[0]}{more}, whose outputs adapters[{j}] changes"
                reasons.append(Reason("mixed_sides", f"adapters[{i}]", found, "changes of one side of a linear"))
    return reasons


def _strength(first: float, last: float) -> str:
    return f"{first:g}" if first == last else f"[{first:g}, {last:g}]"
