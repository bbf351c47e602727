"""The rules of composition: what stacks exactly is let through, everything else is refused with its reason."""

from __future__ import annotations

import pytest
import torch

from deltaserve.core import Binding, BindingPart
from deltaserve.deltas import composition
from deltaserve.deltas.composition import ADDITIVE, FamilyRule, Traits, check_composition, traits_of
from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve.deltas.vector_terms import NormTerm, VectorTerm
from deltaserve.errors import CompositionRefused

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
LORA, SPARSE = Traits(("lora",)), Traits(("sparse",))
DORA = Traits(("lora", "vector"), output_scales=frozenset({UP, DOWN}))
IA3 = Traits(("vector",), input_scales=frozenset({DOWN}), output_scales=frozenset({UP}))
GATES = Traits(("vector",), input_scales=frozenset({UP, DOWN}))
NORMS = Traits(("vector",))
PREFIX = Traits(("prefix",))
STRANGE = Traits(("something-new",))


def binding(count: int, *scales: tuple[float, float]) -> Binding:
    given = [*scales, *[(1.0, 1.0)] * (count - len(scales))]
    return Binding(tuple(BindingPart(f"v{i}", *scale) for i, scale in enumerate(given)))


def refused(*traits: Traits, scales: tuple[tuple[float, float], ...] = ()) -> list[tuple[str, str]]:
    try:
        check_composition(binding(len(traits), *scales), traits)
    except CompositionRefused as error:
        return [(reason.code, reason.where) for reason in error.reasons]
    return []


@pytest.mark.parametrize(
    "traits",
    [
        (),
        (LORA,),
        (LORA, LORA, LORA),
        (LORA, SPARSE, NORMS),
        (DORA, DORA, LORA),  # scales of one side stack
        (IA3, IA3, SPARSE),
        (GATES, GATES),
        (PREFIX, PREFIX, LORA),
        (DORA, PREFIX),
        (STRANGE,),
    ],
)
def test_sums_that_are_exact_are_let_through(traits: tuple[Traits, ...]) -> None:
    assert not refused(*traits)


def test_any_strength_goes_with_what_is_linear() -> None:
    assert not refused(LORA, SPARSE, DORA, scales=((-2.0, 0.5), (0.0, 0.0), (0.3, 1.0)))


def test_scales_of_both_sides_of_a_linear_have_no_sum() -> None:
    assert refused(LORA, IA3, DORA) == [("mixed_sides", "adapters[1]")]
    assert refused(DORA, SPARSE, IA3, GATES) == [("mixed_sides", "adapters[2]"), *[("mixed_sides", "adapters[3]")] * 2]
    with pytest.raises(CompositionRefused, match=rf"adapters\[0\] has a change of the inputs of {DOWN} and of 1 more"):
        check_composition(binding(2), [GATES, DORA])
    with pytest.raises(CompositionRefused) as caught:
        check_composition(binding(2), [GATES, DORA])
    assert (caught.value.status, caught.value.param) == (400, "adapters")
    # What is at strength 0 does not take part.
    assert not refused(DORA, IA3, LORA, scales=((1.0, 1.0), (0.0, 0.0)))
    assert refused(DORA, IA3, LORA, scales=((1.0, 1.0), (0.0, 0.1))) == [("mixed_sides", "adapters[1]")]
    # Each on a linear of its own is no mixture.
    assert not refused(Traits(input_scales=frozenset({UP})), Traits(output_scales=frozenset({DOWN})))


def test_a_kind_that_no_rule_knows_is_served_alone_and_whole() -> None:
    assert refused(LORA, STRANGE) == [("served_alone", "adapters[1]")]
    assert refused(STRANGE, scales=((0.5, 0.5),)) == [("strength_not_linear", "adapters[0]")]
    assert refused(STRANGE, scales=((0.0, 1.0),)) == [("strength_not_linear", "adapters[0]")]
    with pytest.raises(CompositionRefused) as caught:
        check_composition(Binding((BindingPart("v", 0.5, 0.5),)), [STRANGE])
    assert caught.value.param == "adapters[0].scale"
    assert not refused(STRANGE, scales=((0.0, 0.0),))


def test_a_prefix_is_there_or_not() -> None:
    assert not refused(PREFIX, LORA, PREFIX, scales=((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)))
    for scale in ((0.5, 0.5), (0.0, 1.0), (-1.0, -1.0)):
        assert refused(LORA, PREFIX, scales=((1.0, 1.0), scale)) == [("strength_not_linear", "adapters[1]")]


def test_rules_are_read_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind may stack and yet have no strengths, or the other way round."""
    rules = {"lora": ADDITIVE, "switch": FamilyRule(adds=True, is_switch=True), "lonely": FamilyRule(False, False)}
    monkeypatch.setattr(composition, "RULES", rules)
    switch, lonely = Traits(("switch",)), Traits(("lonely",))
    assert not refused(switch, LORA, switch, scales=((1.0, 1.0), (0.5, 0.5)))
    assert refused(switch, LORA, scales=((0.5, 0.5),)) == [("strength_not_linear", "adapters[0]")]
    assert refused(lonely, LORA) == [("served_alone", "adapters[0]")]
    assert not refused(lonely, scales=((0.5, 0.5),))


def test_traits_are_read_from_the_folded_terms() -> None:
    ones = torch.ones(4)
    terms = {
        UP: (LowRankTerm(torch.ones(1, 4), torch.ones(1, 4)), VectorTerm(scale=ones)),
        DOWN: (VectorTerm(in_scale=ones),),
        "lm_head": (VectorTerm(bias=ones),),
    }
    found = traits_of(FoldedAdapter(terms, "f" * 64, torch.float32))
    assert found == Traits(("lora", "vector"), frozenset({DOWN}), frozenset({UP}))
    only_norms = FoldedAdapter({}, "f" * 64, torch.float32, {"model.norm": NormTerm(gain=ones)})
    assert traits_of(only_norms) == Traits(("vector",))
