"""PEFT types whose files hold a seed: the draw is PEFT's, over the modules in PEFT's order, or the file is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_delta, fold
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.peft_kinds import draws
from deltaserve_store.formats.peft_kinds import psoft as psoft_kind
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import BaseSpec, LinearSpec
from deltatest.of_kind import all_of
from deltatest.peft_adapters import edit_config
from deltatest.peft_kinds import make_kind, merged_deltas
from deltatest.tiny_models import save_random, tiny_config

CASES = ("unilora-seed", "tinylora-groups", "tinylora-seed")
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, BaseModel]:
    """A base that registers k, v, q, and calls q, k, v."""
    folder = tmp_path_factory.mktemp("opt")
    save_random(tiny_config("opt", ffn_dim=96, word_embed_proj_dim=64), folder)
    base = load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), base


@pytest.fixture(scope="module")
def shelf(opt: tuple[Any, BaseModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("drawn")
    targets = ("q_proj", "k_proj", "v_proj", "fc2")
    return {name: make_kind(opt[0], root / name, name, targets=targets, seed=3) for name in CASES}


def reasons_of(folder: Path, spec: BaseSpec) -> list[tuple[str, str]]:
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, spec)
    return [(reason.code, reason.where) for reason in raised.value.reasons]


@pytest.mark.parametrize("name", CASES)
def test_modules_are_counted_in_the_order_of_registration(
    name: str, opt: tuple[Any, BaseModel], shelf: dict[str, Path]
) -> None:
    model, base = opt
    called = [path for path in base.spec.linears if "layers.0.self_attn" in path]
    assert called != [path for path in base.spec.registered if "layers.0.self_attn" in path], "nothing to tell apart"
    adapter = read_adapter(shelf[name], base.spec)
    folded = fold(adapter, base.spec, torch.float32)
    for module, delta in merged_deltas(model, shelf[name], list(folded.terms)).items():
        size = float(delta.abs().max())
        assert size > 1e-3
        for found in (dense_delta(folded, module, base.spec), dense_delta(adapter, module, base.spec)):
            assert float((found.double() - delta).abs().max()) < 1e-5 * max(1.0, size)


@pytest.mark.parametrize("name", CASES)
def test_a_base_that_does_not_tell_its_order_is_refused(
    name: str, opt: tuple[Any, BaseModel], shelf: dict[str, Path]
) -> None:
    field = {"unilora-seed": "save_indices", "tinylora-groups": "weight_tying", "tinylora-seed": "save_projection"}
    spec = replace(opt[1].spec, registered=())
    assert reasons_of(shelf[name], spec) == [("seed_not_usable", f"{CONFIG}:{field[name]}")]


def test_a_linear_that_is_counted_but_not_served_is_refused(opt: tuple[Any, BaseModel], shelf: dict[str, Path]) -> None:
    """It takes a part of the draw, so that without it every other linear would get another's numbers."""
    spec = opt[1].spec
    outside = replace(spec, registered=("model.decoder.project_in.fc2", *spec.registered))
    assert reasons_of(shelf["unilora-seed"], outside) == [("unsupported_target", f"{CONFIG}:target_modules")]


@pytest.mark.parametrize(
    ("name", "known", "field"),
    [
        ("unilora-seed", "_KNOWN_SHUFFLE", "proj_seed"),
        ("tinylora-seed", "_KNOWN_NORMAL", "projection_seed"),
    ],
)
def test_a_generator_that_draws_otherwise_is_refused(
    name: str,
    known: str,
    field: str,
    opt: tuple[Any, BaseModel],
    shelf: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert draws.is_known_normal()
    assert draws.is_known_shuffle()
    monkeypatch.setattr(draws, known, (0,))
    assert reasons_of(shelf[name], opt[1].spec) == [("seed_not_usable", f"{CONFIG}:{field}")]


@pytest.mark.parametrize(("name", "field"), [("unilora-seed", "proj_seed"), ("tinylora-seed", "projection_seed")])
def test_the_seed_is_applied(
    name: str, field: str, opt: tuple[Any, BaseModel], shelf: dict[str, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(shelf[name], tmp_path / "other"))
    edit_config(other, **{field: 77})
    one, two = all_of(LoraDelta, (read_adapter(folder, opt[1].spec).deltas[0] for folder in (shelf[name], other)))
    assert not torch.equal(one.a, two.a)


@pytest.mark.parametrize(
    ("count", "length"), [(1, 1), (7, 20), (1000, 40), (4096, 256), (50_000, 12_000), (3, 1 << 14)]
)
def test_the_balanced_draw_is_that_of_peft(count: int, length: int) -> None:
    from peft.tuners.unilora.model import UniLoraModel

    found = draws.balanced_draw(count, length, 11)
    assert torch.equal(found.long(), UniLoraModel.generate_index(count, length, 11))


def test_too_many_numbers_to_draw_are_refused(opt: tuple[Any, BaseModel], shelf: dict[str, Path]) -> None:
    spec = opt[1].spec
    wide = {name: LinearSpec(name, 1 << 24, 1 << 22) for name in spec.linears}
    assert reasons_of(shelf["unilora-seed"], replace(spec, linears=wide)) == [
        ("seed_not_usable", f"{CONFIG}:proj_seed")
    ]


@pytest.fixture(scope="module")
def psoft(opt: tuple[Any, BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kind(opt[0], tmp_path_factory.mktemp("psoft") / "a", "psoft", targets=("q_proj", "fc2"), seed=3)


def test_directions_that_singular_values_leave_open_are_refused(opt: tuple[Any, BaseModel], psoft: Path) -> None:
    """Any rotation of two directions of one size is as good a decomposition, and another adapter."""
    base = opt[1]

    def weight_of(name: str) -> torch.Tensor:
        left, sizes, right = torch.linalg.svd(base.linear(name).rows(0, 1 << 40), full_matrices=False)
        sizes[3] = sizes[2] * (1 - 1e-5)
        return (left * sizes) @ right

    parsed = read_adapter(psoft, base.spec)
    with pytest.raises(AdapterInvalid) as raised:
        parsed.on_base(weight_of)
    assert [reason.code for reason in raised.value.reasons] == ["seed_not_usable"]
    assert parsed.on_base(lambda name: base.linear(name).rows(0, 1 << 40)).rank == 6


@pytest.mark.parametrize("part", [0, 1, 2])
def test_the_proofs_formula_decomposes_by_itself(
    opt: tuple[Any, BaseModel], psoft: Path, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong U, S or V of the term does not reach it."""
    base, decompose = opt[1], psoft_kind.leading_directions

    def wrong(weight: torch.Tensor, rank: int, module: str) -> tuple[torch.Tensor, ...]:
        given = list(decompose(weight, rank, module))
        given[part] = given[part].flip(0)
        return tuple(given)

    monkeypatch.setattr(psoft_kind, "leading_directions", wrong)
    parsed = read_adapter(psoft, base.spec).on_base(lambda name: base.linear(name).rows(0, 1 << 40))
    monkeypatch.undo()
    exact = read_adapter(psoft, base.spec).on_base(lambda name: base.linear(name).rows(0, 1 << 40))
    for bad, good in zip(all_of(LoraDelta, parsed.deltas), all_of(LoraDelta, exact.deltas), strict=True):
        assert bad.dense is not None
        formula, served, wanted = bad.dense(), bad.b @ bad.a, good.b @ good.a
        assert float((formula - wanted).abs().max()) < 1e-4
        assert float((served - wanted).abs().max()) > 0.01


def test_signs_are_those_of_the_decomposition(
    opt: tuple[Any, BaseModel], psoft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change what is served, so that a build with other signs is refused, and whoever uploads is told."""
    base = opt[1]

    def weight_of(name: str) -> torch.Tensor:
        return base.linear(name).rows(0, 1 << 40)

    parsed = read_adapter(psoft, base.spec)
    assert [note.partition(":")[0] for note in parsed.notes] == ["PSOFT"]
    before = parsed.on_base(weight_of).deltas[0]
    decompose = torch.linalg.svd

    def turned(matrix: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        left, sizes, right = decompose(matrix, **options)
        signs = torch.ones(len(sizes))
        signs[1] = -1
        return left * signs, sizes, signs[:, None] * right

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", turned)
        after = parsed.on_base(weight_of).deltas[0]
    one, other = (delta.b @ delta.a for delta in all_of(LoraDelta, (before, after)))
    assert float((one - other).abs().max()) > 0.1
    monkeypatch.setattr(psoft_kind, "_KNOWN_SIGNS", ())
    assert reasons_of(psoft, base.spec) == [("seed_not_usable", CONFIG)]
