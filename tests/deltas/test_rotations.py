"""Rotations as they are folded: PEFT's own merged weights, the two formulas apart, and files that are not whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_delta, fold
from deltaserve.deltas.folded import FoldedAdapter, FoldedFileInvalid
from deltaserve.deltas.rotation_terms import RotationTerm
from deltaserve.errors import AdapterRefused
from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import RotationFactor, rotation_change
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.peft_kinds.boft import permutation
from deltaserve_store.formats.peft_kinds.oft import nearest_divisor
from deltaserve_store.formats.peft_kinds.table import READERS
from deltaserve_store.rotation_deltas import RotationDelta
from deltaserve_store.vector_deltas import VectorDelta
from deltatest.peft_kinds import merged_deltas
from deltatest.rotation_kinds import CASES, compiler_of, make_rotation
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)
TURNING = [name for name in CASES if name != "beft"]


@dataclasses.dataclass
class Setting:
    base: BaseModel
    model: Any
    folders: dict[str, Path]

    def deltas(self, name: str) -> dict[str, RotationDelta]:
        found = read_adapter(self.folders[name], self.base.spec).deltas
        return {delta.module: delta for delta in found if isinstance(delta, RotationDelta)}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("rotations")
    folder = build_tiny_model("llama", root / "base")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    targets = ("v_proj", "down_proj")  # of different widths
    folders = {name: make_rotation(model, root / name, name, targets=targets) for name in CASES}
    return Setting(base, model, folders)


@pytest.mark.parametrize("name", TURNING)
def test_every_weight_changes_as_in_peft(setting: Setting, name: str) -> None:
    """Three ways to the same matrix: PEFT's merge, the method's formula for the proof, and the factors that are run."""
    adapter = read_adapter(setting.folders[name], setting.base.spec)
    deltas = setting.deltas(name)
    with compiler_of(name):
        expected = merged_deltas(setting.model, setting.folders[name], list(deltas))
    for module, wanted in expected.items():
        assert float(wanted.abs().max()) > 1e-2, "a delta of zero proves nothing"
        linear = setting.base.linear(module)
        weight = linear.rows(0, linear.out_features)
        formula = dense_delta(adapter, module, setting.base.spec, setting.base)
        delta = deltas[module]
        factors = tuple(RotationFactor(changes, order) for changes, order in delta.factors)
        # x R W' = x (W R')': rows of the identity, turned, are R.
        if delta.side == "input":
            turn = torch.eye(linear.in_features)
            run = weight @ (turn + rotation_change(turn, factors)).t()
        else:
            run = weight + rotation_change(weight.t(), factors).t()
        run = run if delta.out_scale is None else delta.out_scale[:, None] * run
        assert float((formula.double() - wanted).abs().max()) < 1e-5
        assert float(((run - weight).double() - wanted).abs().max()) < 1e-5


@pytest.mark.parametrize("name", TURNING)
def test_the_formula_for_the_proof_is_not_what_is_run(setting: Setting, name: str) -> None:
    for delta in setting.deltas(name).values():
        width = setting.base.spec.linears[delta.module].in_features
        weight = torch.randn(setting.base.spec.linears[delta.module].out_features, width)
        before = delta.turn(weight)
        for changes, _ in delta.factors:
            changes.add_(1.0)
        assert torch.equal(delta.turn(weight), before)


def test_every_reader_has_a_case_and_knows_every_field_of_the_installed_peft() -> None:
    import peft

    kinds = {case.config.removesuffix("Config").upper(): case.config for case in CASES.values()}
    assert set(kinds) == {kind for kind, reader in READERS.items() if reader.kind == "rotation"} | {"BEFT"}
    for kind, config in kinds.items():
        fields = {entry.name for entry in dataclasses.fields(getattr(peft, config))} - {"runtime_config"}
        assert fields <= set(READERS[kind].fields)


@pytest.mark.parametrize("inputs", [1, 7, 12, 64, 97, 360, 4096])
@pytest.mark.parametrize("wanted", [1, 2, 5, 12, 32, 63, 1000, 5000])
def test_sizes_that_divide_nothing_move_as_in_peft(inputs: int, wanted: int) -> None:
    from peft.tuners.oft.layer import OFTLayer

    if inputs % wanted:  # PEFT asks only then
        assert nearest_divisor(inputs, wanted) == OFTLayer.adjust_oft_parameters(None, inputs, wanted)
    else:
        assert nearest_divisor(inputs, wanted) == wanted


@pytest.mark.parametrize(("inputs", "size", "factors"), [(16, 4, 3), (48, 2, 4), (64, 8, 2), (24, 4, 2)])
def test_butterflies_are_those_of_peft(inputs: int, size: int, factors: int) -> None:
    from peft.tuners.boft.layer import BOFTLayer

    for level in range(factors):
        blocks = inputs // size // 2**level
        wanted = BOFTLayer.block_butterfly_perm(None, inputs, blocks, size // 2, factors - 1)
        assert torch.equal(permutation(inputs, size, level), wanted)


def test_a_file_that_was_turned_by_bits_of_another_config_does_not_pass_for_it(setting: Setting) -> None:
    """Cayley and PEFT's series turn in opposite senses: the flag is applied, not only accepted."""
    exact, series = setting.deltas("oft"), setting.deltas("oft-series")
    for module, delta in exact.items():
        assert not torch.allclose(delta.factors[0].changes, series[module].factors[0].changes, atol=1e-2)


def refused(setting: Setting, *deltas: RotationDelta | VectorDelta, dtype: torch.dtype = torch.float32) -> list[Any]:
    adapter = replace(read_adapter(setting.folders["oft"], setting.base.spec), deltas=deltas)
    with pytest.raises(AdapterRefused) as caught:
        fold(adapter, setting.base.spec, dtype, setting.base)
    return [(reason.code, reason.where) for reason in caught.value.reasons]


def test_what_does_not_fit_is_refused(setting: Setting) -> None:
    module, delta = next(iter(setting.deltas("oft").items()))
    assert refused(setting, delta, delta) == [("duplicate_module", module)]
    bias = VectorDelta(module, bias=torch.ones(setting.base.spec.linears[module].out_features))
    assert refused(setting, bias, delta) == [("duplicate_module", module)]
    assert refused(setting, replace(delta, module="model.layers.9.v")) == [("unknown_module", "model.layers.9.v")]
    (blocks,) = delta.factors
    fewer = replace(delta, factors=(blocks._replace(changes=blocks.changes[1:]),))
    assert refused(setting, fewer) == [("shape_mismatch", module)]
    huge = replace(delta, factors=(blocks._replace(changes=blocks.changes * 1e6),))
    assert refused(setting, huge, dtype=torch.float16) == [("value_out_of_range", module)]
    with pytest.raises(ValueError, match="give the base"):
        fold(read_adapter(setting.folders["oft"], setting.base.spec), setting.base.spec, torch.float32)


def change_factor(change: Callable[[RotationFactor], RotationFactor]) -> Callable[[RotationTerm], RotationTerm]:
    return lambda term: replace(term, factors=tuple(change(factor) for factor in term.factors))


def with_order(order: Tensor) -> Callable[[RotationTerm], RotationTerm]:
    return change_factor(lambda factor: factor._replace(order=order))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_factor(lambda factor: factor._replace(blocks=factor.blocks[:2])), "blocks"),
        (change_factor(lambda factor: factor._replace(blocks=factor.blocks[:, :4])), "blocks"),
        (change_factor(lambda factor: factor._replace(blocks=factor.blocks[:, 0])), "blocks"),
        (change_factor(lambda factor: factor._replace(blocks=factor.blocks.bfloat16())), "bfloat16"),
        (with_order(torch.zeros(64, dtype=torch.int32)), "order"),
        (with_order(torch.arange(1, 65, dtype=torch.int32)), "order"),
        (with_order(torch.arange(63, dtype=torch.int32)), "order"),
        (with_order(torch.arange(64).float()), "order"),
        (lambda term: replace(term, factors=(*term.factors * 33,)), "unexpected parts"),
    ],
)
def test_rotations_that_do_not_fit_the_base_do_not_load(
    setting: Setting, tmp_path: Path, change: Callable[[RotationTerm], RotationTerm], told: str
) -> None:
    """An order that is no permutation would make an operator read foreign memory."""
    folded = fold(
        read_adapter(setting.folders["oft"], setting.base.spec), setting.base.spec, torch.float32, setting.base
    )
    folded.save(tmp_path / "good")
    assert FoldedAdapter.load(tmp_path / "good", setting.base.spec, torch.float32).kinds == ("rotation",)
    module = next(name for name in folded.terms if name.endswith("v_proj"))
    (term,) = folded.terms[module]
    assert isinstance(term, RotationTerm)
    replace(folded, terms={**folded.terms, module: (change(term),)}).save(tmp_path / "bad")
    with pytest.raises(FoldedFileInvalid, match=told):
        FoldedAdapter.load(tmp_path / "bad", setting.base.spec, torch.float32)
