"""Vector terms: the folds of methods, and what a folded file of vectors may not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from deltaserve.adapters.vector_entries import vector_entries
from deltaserve.deltas.fold import fold
from deltaserve.deltas.folded import FoldedAdapter, FoldedFileInvalid, LowRankTerm, Term
from deltaserve.deltas.vector_terms import NormTerm, VectorTerm
from deltaserve.errors import AdapterRefused
from deltaserve_store.parsed import LoraDelta, ParsedAdapter
from deltaserve_store.spec import BaseSpec, LinearSpec, NormSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

SPEC = BaseSpec(
    fingerprint="f" * 64,
    names=("tests/tiny",),
    model_type="llama",
    linears={name: LinearSpec(name, 5, 7, has_bias=name == "a.q") for name in ("a.q", "a.up")},
    vocab_size=64,
    num_layers=1,
    hidden_size=7,
    norms={"a.norm": NormSpec("a.norm", 7), "a.ln": NormSpec("a.ln", 7, has_bias=True)},
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class FakeBase:
    """Weights of ``SPEC``."""

    def __init__(self) -> None:
        self.weight = {name: randn(5, 7, seed=index) for index, name in enumerate(SPEC.linears)}
        self.bias = {"a.q": randn(5, seed=9), "a.up": None}
        self.norms = {"a.norm": (1 + randn(7, seed=5), None), "a.ln": (1 + randn(7, seed=6), randn(7, seed=7))}

    def linear(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(bias=self.bias[name], rows=lambda i, j: self.weight[name][i:j])

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.norms[name]


def parsed(*deltas: LoraDelta | VectorDelta | NormDelta) -> ParsedAdapter:
    return ParsedAdapter("vector", "deltaserve-vectors", deltas, {}, None, None, None, 1)


def folded(*deltas: LoraDelta | VectorDelta | NormDelta) -> FoldedAdapter:
    return fold(parsed(*deltas), SPEC, torch.float32, FakeBase())


def vector_of(terms: tuple[Term, ...]) -> VectorTerm:
    (term,) = [term for term in terms if isinstance(term, VectorTerm)]
    return term


def outputs(adapter: FoldedAdapter, name: str, x: Tensor, strength: float = 1.0) -> Tensor:
    """What the runtime computes, in float64."""
    base, y = FakeBase(), x.double()
    vectors = vector_of(adapter.terms[name])
    if vectors.in_scale is not None:
        y = y * (1 + strength * (vectors.in_scale.double() - 1))
    y = y @ base.weight[name].double().t()
    bias = base.bias[name]
    y = y if bias is None else y + bias.double()
    y = y if vectors.scale is None else y * (1 + strength * (vectors.scale.double() - 1))
    y = y if vectors.bias is None else y + strength * vectors.bias.double()
    for term in adapter.terms[name]:
        if isinstance(term, LowRankTerm):
            y = y + strength * (x.double() @ term.a.double().t()) @ term.b_t.double()
    return y


@pytest.mark.parametrize("name", ["a.q", "a.up"])
@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
def test_dora_is_a_scale_and_a_scaled_low_rank_term(name: str, strength: float) -> None:
    magnitude, scaling = 1 + randn(5, seed=1).abs(), 0.7
    lora = LoraDelta(name, randn(2, 7, seed=2), randn(5, 2, seed=3), scaling, magnitude)
    base, x = FakeBase(), randn(4, 7, seed=4)
    weight = base.weight[name].double()
    changed = weight + scaling * lora.b.double() @ lora.a.double()
    changed = magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
    wanted = x.double() @ (weight + strength * (changed - weight)).t()
    wanted = wanted if base.bias[name] is None else wanted + base.bias[name].double()  # never scaled
    torch.testing.assert_close(outputs(folded(lora), name, x, strength), wanted, atol=1e-5, rtol=1e-5)


def test_a_scale_meets_the_bias_only_where_the_method_says_so() -> None:
    scale, x, base = 1 + randn(5, seed=1), randn(4, 7, seed=4), FakeBase()
    bias = base.bias["a.q"]
    assert bias is not None
    product = x.double() @ base.weight["a.q"].double().t()
    both = folded(VectorDelta("a.q", out_scale=scale, scales_bias=True))
    torch.testing.assert_close(outputs(both, "a.q", x), (product + bias) * scale, atol=1e-5, rtol=1e-5)
    alone = folded(VectorDelta("a.q", out_scale=scale))
    torch.testing.assert_close(outputs(alone, "a.q", x), product * scale + bias, atol=1e-5, rtol=1e-5)


def test_biases_are_added_or_stand_in_place() -> None:
    given, base = randn(5, seed=1), FakeBase()
    stored = base.bias["a.q"]
    assert stored is not None
    assert torch.equal(vector_of(folded(VectorDelta("a.q", bias=given)).terms["a.q"]).bias, given)
    new = vector_of(folded(VectorDelta("a.q", new_bias=given)).terms["a.q"])
    assert torch.equal(new.bias, given - stored)
    assert torch.equal(vector_of(folded(VectorDelta("a.up", new_bias=given)).terms["a.up"]).bias, given)


def test_what_is_added_to_an_input_becomes_a_bias() -> None:
    offset, scale, x, base = randn(7, seed=1), 1 + randn(5, seed=2), randn(4, 7, seed=4), FakeBase()
    weight, bias = base.weight["a.q"].double(), base.bias["a.q"]
    assert bias is not None
    both = folded(VectorDelta("a.q", bias=randn(5, seed=3), in_bias=offset))
    wanted = (x + offset).double() @ weight.t() + bias + randn(5, seed=3)
    torch.testing.assert_close(outputs(both, "a.q", x), wanted, atol=1e-5, rtol=1e-5)
    gated = folded(VectorDelta("a.q", out_scale=scale, in_scale=randn(7, seed=5), in_bias=offset))
    wanted = (x * randn(7, seed=5)).double() @ weight.t() * scale + bias + weight @ offset.double()
    torch.testing.assert_close(outputs(gated, "a.q", x), wanted, atol=1e-5, rtol=1e-5)


def test_norms_become_differences() -> None:
    gain, shift, base = randn(7, seed=1), randn(7, seed=2), FakeBase()
    weight, bias = base.norm("a.ln")
    assert bias is not None
    term = folded(NormDelta("a.ln", gain, shift, replaces=True)).norms["a.ln"]
    assert torch.equal(term.gain, gain - weight)
    assert torch.equal(term.shift, shift - bias)
    assert torch.equal(folded(NormDelta("a.ln", gain)).norms["a.ln"].gain, gain)


def refused(*deltas: LoraDelta | VectorDelta | NormDelta) -> list[tuple[str, str]]:
    with pytest.raises(AdapterRefused) as caught:
        folded(*deltas)
    return [(reason.code, reason.where) for reason in caught.value.reasons]


def test_what_does_not_fit_is_refused() -> None:
    assert refused(VectorDelta("a.k", bias=randn(5))) == [("unknown_module", "a.k")]
    assert refused(NormDelta("b.norm", randn(7))) == [("unknown_module", "b.norm")]
    assert refused(VectorDelta("a.q", bias=randn(6)[:4])) == [("shape_mismatch", "a.q (bias)")]
    assert refused(VectorDelta("a.q", in_scale=randn(5))) == [("shape_mismatch", "a.q (in_scale)")]
    assert refused(NormDelta("a.norm", randn(5))) == [("shape_mismatch", "a.norm (gain)")]
    assert refused(VectorDelta("a.q", in_bias=randn(5))) == [("shape_mismatch", "a.q (in_bias)")]
    twice = VectorDelta("a.q", bias=randn(5))
    assert refused(twice, twice) == [("duplicate_module", "a.q")]
    base = FakeBase().weight["a.up"]
    # B A takes the whole weight away: a row of zeros has no direction that a magnitude could stretch.
    nothing = LoraDelta("a.up", -base, torch.eye(5), 1.0, torch.ones(5))
    assert ("value_out_of_range", "a.up (scale)") in refused(nothing)
    with pytest.raises(ValueError, match="give the base"):
        fold(parsed(twice), SPEC, torch.float32)


def sample() -> FoldedAdapter:
    terms: dict[str, tuple[Term, ...]] = {
        "a.q": (LowRankTerm(randn(3, 7), randn(3, 5)), VectorTerm(randn(5), randn(5))),
        "a.up": (VectorTerm(in_scale=randn(7)),),
    }
    norms = {"a.norm": NormTerm(randn(7)), "a.ln": NormTerm(None, randn(7))}
    return FoldedAdapter(terms, SPEC.fingerprint, torch.float32, norms)


def test_a_file_of_vectors_comes_back_as_it_was(tmp_path: Path) -> None:
    written = sample()
    written.save(tmp_path / "f")
    read = FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)
    assert (read.kinds, read.nbytes) == (("lora", "vector"), written.nbytes)
    assert list(read.norms) == ["a.norm", "a.ln"]
    pairs = [(vector_of(written.terms[name]), vector_of(read.terms[name])) for name in written.terms]
    for before, after in [*pairs, *zip(written.norms.values(), read.norms.values(), strict=True)]:
        assert before.tensors().keys() == after.tensors().keys()
        for role, tensor in before.tensors().items():
            assert torch.equal(after.tensors()[role], tensor)
            assert after.tensors()[role].data_ptr() % 64 == 0


def test_what_bfloat16_holds_is_kept_in_it_and_widened_for_a_gpu(tmp_path: Path) -> None:
    gates, half, wide = (torch.arange(7) % 2).float(), randn(5, seed=1).bfloat16(), randn(5, seed=2)
    cases = (
        (VectorDelta("a.up", out_scale=half, in_scale=gates), VectorTerm(half, None, gates.bfloat16())),
        (VectorDelta("a.up", out_scale=half, bias=half), VectorTerm(half, half)),
        # Scale and bias are read together, and so have one dtype.
        (
            VectorDelta("a.up", out_scale=half, bias=wide, in_scale=gates),
            VectorTerm(half.float(), wide, gates.bfloat16()),
        ),
        (VectorDelta("a.up", out_scale=half, in_scale=randn(7)), VectorTerm(half, None, randn(7))),
        # Next to nothing: 1 + (scale - 1) is another number.
        (
            VectorDelta("a.up", out_scale=half * 2**-20, in_scale=gates),
            VectorTerm(half.float() * 2**-20, None, gates.bfloat16()),
        ),
    )
    for index, (delta, wanted) in enumerate(cases):
        adapter = folded(delta)
        adapter.save(tmp_path / str(index))
        for found in (adapter, FoldedAdapter.load(tmp_path / str(index), SPEC, torch.float32)):
            kept, expected = vector_of(found.terms["a.up"]).tensors(), wanted.tensors()
            assert kept.keys() == expected.keys()
            for role, tensor in expected.items():
                assert kept[role].dtype == tensor.dtype
                assert torch.equal(kept[role], tensor)
        entries = vector_entries(adapter, {"a.up": 0}, {}, is_wide=True)
        ours = vector_entries(adapter, {"a.up": 0}, {})
        assert ours.nbytes == wanted.nbytes
        for told, own in zip((*entries.outputs, *entries.inputs), (*ours.outputs, *ours.inputs), strict=True):
            for vector, narrow in zip(told[1], own[1], strict=True):
                assert (vector is None) == (narrow is None)
                assert vector is None or (vector.dtype == torch.float32 and torch.equal(vector, narrow.float()))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: replace(a, terms={**a.terms, "a.up": (VectorTerm(randn(7)),)}), "scale"),
        (lambda a: replace(a, terms={**a.terms, "a.up": (VectorTerm(in_scale=randn(5)),)}), "in_scale"),
        (lambda a: replace(a, terms={**a.terms, "a.up": (VectorTerm(bias=randn(5).half()),)}), "float16"),
        (lambda a: replace(a, terms={**a.terms, "a.up": (VectorTerm(randn(5), randn(5).bfloat16()),)}), "a bias"),
        (lambda a: replace(a, norms={"a.norm": NormTerm(randn(5))}), "gain"),
        (lambda a: replace(a, norms={"a.norm": NormTerm(None, randn(7))}), "shift"),
        (lambda a: replace(a, norms={"b.norm": NormTerm(randn(7))}), "no linear"),
        (lambda a: replace(a, norms={"a.q": NormTerm(randn(7))}), "unexpected parts"),
    ],
)
def test_vectors_that_do_not_fit_the_base_do_not_load(
    tmp_path: Path, change: Callable[[FoldedAdapter], FoldedAdapter], told: str
) -> None:
    change(sample()).save(tmp_path / "f")
    with pytest.raises(FoldedFileInvalid, match=told):
        FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)
