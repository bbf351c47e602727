"""Rotations on bases that PEFT has no layers for; the project's own format of rotations, whole and damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.deltaserve_rotations import write_rotation_adapter
from deltaserve_store.rotation_deltas import RotationDelta
from deltatest.adapter_corpus import CONFIG, corpus_base, edit_config, edit_tensors
from deltatest.kind_corpus import GOOD_KINDS
from deltatest.of_kind import all_of
from deltatest.rotation_kinds import make_givens, whole_matrix

JSON, FILE = "adapter.json", "adapter.safetensors"
Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
MODULES = f"{JSON}:modules"


@pytest.mark.parametrize("kind", ["oft", "road", "boft", "beft"])
def test_linears_that_are_stored_turned_are_refused(kind: str, tmp_path: Path) -> None:
    """PEFT has none of these types for Conv1D: such a file was not made on this base."""
    base = corpus_base()
    turned = replace(base, linears={name: replace(one, transposed=True) for name, one in base.linears.items()})
    folder = GOOD_KINDS[kind](tmp_path / "adapter")
    if kind in ("oft", "boft"):
        edit_config(fan_in_fan_out=True)(folder)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, turned)
    found = {(reason.code, reason.where) for reason in raised.value.reasons}
    assert found == {("unsupported_target", f"{CONFIG}:target_modules")}


def test_the_own_format_reads_what_it_wrote_and_its_formula_is_the_whole_matrix(tmp_path: Path) -> None:
    base = corpus_base()
    folder = make_givens(base, tmp_path / "givens")
    parsed = read_adapter(folder, base)
    assert (parsed.kind, parsed.file_format, parsed.rank) == ("rotation", "deltaserve-rotations", None)
    written = load_file(folder / FILE)
    sizes = 0
    for delta in parsed.deltas:
        assert isinstance(delta, RotationDelta)
        for at, (changes, order) in enumerate(delta.factors):
            assert torch.equal(changes, written[f"{delta.module}.changes.{at}"])
            assert (order is None) == (at == 0)
        linear = base.linears[delta.module]
        width = linear.in_features if delta.side == "input" else linear.out_features
        sizes += 3 * 2 * width  # rounds of blocks of 2: linear in the width
        weight = torch.randn(linear.out_features, linear.in_features)
        matrix = whole_matrix(delta, width)
        wanted = weight.double() @ matrix.t() if delta.side == "input" else matrix.t() @ weight.double()
        assert float((delta.turn(weight).double() - wanted).abs().max()) < 1e-5
    assert parsed.num_parameters == sizes
    with pytest.raises(ValueError, match="given twice"):
        write_rotation_adapter(tmp_path / "x", 2 * all_of(RotationDelta, parsed.deltas)[:1], "f" * 64)
    with pytest.raises(ValueError, match="nothing to write"):
        write_rotation_adapter(tmp_path / "x", [], "f" * 64)


PARTS = {"side": "input", "factors": 3, "orders": [1, 2]}


def module(name: str, parts: object) -> object:
    """The config with other words about one module."""
    base = corpus_base()
    modules = {
        path: {**PARTS, "side": "output" if path.endswith("v_proj") else "input"}
        for path in base.linears
        if path.endswith(("q_proj", "v_proj", "down_proj"))
    }
    return edit_config(JSON, modules={**modules, name: parts})


@pytest.mark.parametrize(
    ("spoil", "reasons"),
    [
        (edit_tensors({f"{Q0}.changes.1": None}, FILE), {("missing_tensor", f"{Q0}.changes.1")}),
        (edit_tensors({f"{Q0}.order.2": None}, FILE), {("missing_tensor", f"{Q0}.order.2")}),
        (edit_tensors({f"{Q0}.extra": torch.ones(3)}, FILE), {("unexpected_tensor", f"{Q0}.extra")}),
        (edit_tensors({f"{Q0}.order.0": torch.arange(16).int()}, FILE), {("unexpected_tensor", f"{Q0}.order.0")}),
        (edit_tensors({f"{Q0}.changes.1": torch.ones(7, 2, 2)}, FILE), {("shape_mismatch", f"{Q0}.changes.1")}),
        (edit_tensors({f"{Q0}.changes.1": torch.ones(1, 3, 3)}, FILE), {("shape_mismatch", f"{Q0}.changes.1")}),
        (edit_tensors({f"{Q0}.changes.1": torch.ones(8, 4, 2)}, FILE), {("shape_mismatch", f"{Q0}.changes.1")}),
        (edit_tensors({f"{Q0}.changes.1": torch.ones(8, 2)}, FILE), {("shape_mismatch", f"{Q0}.changes.1")}),
        (edit_tensors({f"{Q0}.changes.1": torch.ones(8, 0, 0)}, FILE), {("shape_mismatch", f"{Q0}.changes.1")}),
        (
            edit_tensors({f"{Q0}.changes.1": torch.ones(8, 2, 2).int()}, FILE),
            {("unsupported_dtype", f"{Q0}.changes.1")},
        ),
        (
            edit_tensors({f"{Q0}.changes.1": torch.full((8, 2, 2), torch.nan)}, FILE),
            {("non_finite", f"{Q0}.changes.1")},
        ),
        (
            edit_tensors({f"{Q0}.changes.1": torch.full((8, 2, 2), 1e6)}, FILE),
            {("value_out_of_range", f"{Q0}.changes.1")},
        ),
        (edit_tensors({f"{Q0}.order.1": torch.arange(16)}, FILE), {("unsupported_dtype", f"{Q0}.order.1")}),
        (edit_tensors({f"{Q0}.order.1": torch.arange(15).int()}, FILE), {("shape_mismatch", f"{Q0}.order.1")}),
        (edit_tensors({f"{Q0}.order.1": torch.arange(1, 17).int()}, FILE), {("index_out_of_range", f"{Q0}.order.1")}),
        (edit_tensors({f"{Q0}.order.1": torch.arange(16).int() - 1}, FILE), {("index_out_of_range", f"{Q0}.order.1")}),
        (edit_tensors({f"{Q0}.order.1": torch.zeros(16).int()}, FILE), {("duplicate_index", f"{Q0}.order.1")}),
        (edit_config(JSON, base_fingerprint="0" * 64), {("base_mismatch", f"{JSON}:base_fingerprint")}),
        (edit_config(JSON, wings=2), {("unknown_field", f"{JSON}:wings")}),
        *(
            (module(Q0, parts), {("invalid_value", f"{MODULES}:{Q0}"), *_strays})
            for _strays in [
                {("unexpected_tensor", f"{Q0}.{name}") for name in ("changes.0", "changes.1", "changes.2")}
                | {("unexpected_tensor", f"{Q0}.{name}") for name in ("order.1", "order.2")}
            ]
            for parts in (
                None,
                {**PARTS, "side": "both"},
                {**PARTS, "factors": 0},
                {**PARTS, "factors": 17},
                {**PARTS, "factors": True},
                {**PARTS, "orders": [3]},
                {**PARTS, "orders": [1, 1]},
                {**PARTS, "orders": 1},
                {**PARTS, "more": 1},
                {"side": "input", "factors": 3},
            )
        ),
        (module("model.layers.9.q_proj", PARTS), {("unknown_module", f"{MODULES}:model.layers.9.q_proj")}),
        (module("lm_head", PARTS), {("unsupported_target", f"{MODULES}:lm_head")}),
        (edit_config(JSON, modules=[]), {("invalid_value", MODULES)}),
    ],
)
def test_damaged_files_of_the_own_format_are_refused(
    spoil: Callable[[Path], None], reasons: set[tuple[str, str]], tmp_path: Path
) -> None:
    folder = make_givens(corpus_base(), tmp_path / "givens")
    spoil(folder)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, corpus_base())
    assert {(reason.code, reason.where) for reason in raised.value.reasons} == reasons
