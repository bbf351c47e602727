"""An adapter of several terms is measured whole: loss with it is that of the changed model, without it the base's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaserve_store.formats.deltaserve_terms import write_terms_adapter
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltaserve_trainer.base import Base, load_model, spec_of
from deltaserve_trainer.methods import load_method
from deltatest.trainer_base import make_base


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_term_counts_and_the_base_comes_back(architecture: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = Base(make_base(tmp_path / "base", architecture=architecture), "tiny", "ef" * 32)
    model, changed = load_model(base.folder), load_model(base.folder)
    spec = spec_of(model, base)
    name = next(name for name, linear in spec.linears.items() if linear.in_features == 32)
    other = list(spec.linears)[-1]
    rows, columns = spec.linears[name].out_features, spec.linears[name].in_features
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    a, b, scale, bias = drawn(3, columns), drawn(rows, 3), 1 + drawn(rows), drawn(spec.linears[other].out_features)
    values, gain = drawn(2), drawn(32)
    norm = next(iter(spec.norms))
    at = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([3, 1], dtype=torch.int32)
    deltas = [
        LoraDelta(name, a, b, 1.0),
        SparseDelta(name, *at, values),
        VectorDelta(name, out_scale=scale),
        VectorDelta(other, bias=bias),
        NormDelta(norm, gain=gain),
    ]
    write_terms_adapter(tmp_path / "adapter", deltas, base.fingerprint)

    weight = changed.get_submodule(name).get_parameter("weight").data
    full = (weight.t() if architecture == "gpt2" else weight).clone()
    new = scale[:, None] * full + b @ a
    new[at[0].long(), at[1].long()] += values
    weight.copy_(new.t() if architecture == "gpt2" else new)
    linear = changed.get_submodule(other)
    linear.bias = torch.nn.Parameter(bias if linear.bias is None else linear.bias.data + bias)  # type: ignore[operator]
    changed.get_submodule(norm).get_parameter("weight").data += gain

    ids = torch.tensor([[7, 40, 120, 9]])
    with torch.no_grad():
        plain = model(ids).logits
        method = load_method(model, tmp_path / "adapter", base)
        torch.testing.assert_close(method.model(ids).logits, changed(ids).logits, atol=1e-5, rtol=1e-5)
        with method.disabled():
            assert torch.equal(method.model(ids).logits, plain)
        torch.testing.assert_close(method.model(ids).logits, changed(ids).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, changed(ids).logits, atol=1e-2)
