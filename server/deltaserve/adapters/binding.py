"""A binding against the rules of composition, by what loads have told of its parts."""

from __future__ import annotations

from deltaserve.adapters.residency import AdapterResidency
from deltaserve.core import Binding
from deltaserve.deltas.composition import check_composition


def check_binding(binding: Binding, residency: AdapterResidency) -> None:
    """Raise ``CompositionRefused`` for parts that have no exact sum, as soon as each of them was loaded once."""
    if binding.is_base:
        return
    traits = [own for part in binding.parts if (own := residency.traits(part.version)) is not None]
    if len(traits) == len(binding.parts):
        check_composition(binding, traits)
