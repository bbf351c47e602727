"""Converted PEFT types: the terms they become change weights, logits and a mixed batch as PEFT itself does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.deltas.fold import dense_delta, dense_deltas, fold
from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve.engine.batch import ScheduledPart
from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import LoraTables, SparseTables
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.peft_kinds import positions, randlora, vera
from deltaserve_store.formats.peft_kinds.products import split
from deltaserve_store.formats.peft_kinds.table import READERS
from deltaserve_store.parsed import LoraDelta, ParsedAdapter
from deltatest.of_kind import all_of
from deltatest.paged_driver import PagedDriver
from deltatest.peft_adapters import base_logits, edit_config, make_peft_lora, peft_logits
from deltatest.peft_kinds import CASES, make_kind, merged_deltas
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)
IDS = tuple(torch.randint(3, 199, (30,), generator=torch.Generator().manual_seed(5)).tolist())


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def base(base_folder: Path) -> BaseModel:
    return load_base(base_folder, dtype=torch.float32, cache_dir=base_folder / "cache")


@pytest.fixture(scope="module")
def shelf(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: make_kind(model, root / name, name, seed=index) for index, name in enumerate(CASES)}


def read(folder: Path, base: BaseModel) -> ParsedAdapter:
    def weight_of(linear: str) -> torch.Tensor:
        return base.linear(linear).rows(0, base.linear(linear).out_features)

    return read_adapter(folder, base.spec).on_base(weight_of)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_changes_as_in_peft(name: str, model: Any, base: BaseModel, shelf: dict[str, Path]) -> None:
    """Three ways to the same matrix: PEFT's merge, the folded term, and the method's own formula for the proof."""
    adapter = read(shelf[name], base)
    assert adapter.file_format == f"peft-{CASES[name].config.removesuffix('Config').lower()}"
    folded = fold(adapter, base.spec, torch.float32)
    expected = merged_deltas(model, shelf[name], list(folded.terms))
    assert set(expected) == {delta.module for delta in adapter.deltas}
    for module, delta in expected.items():
        size = float(delta.abs().max())
        assert size > 1e-3, "a delta of zero proves nothing"
        for found in (dense_delta(folded, module, base.spec), dense_delta(adapter, module, base.spec)):
            assert float((found.double() - delta).abs().max()) < 1e-5 * max(1.0, size)


@pytest.mark.parametrize("name", CASES)
def test_the_formula_for_the_proof_is_not_the_conversion(name: str, base: BaseModel, shelf: dict[str, Path]) -> None:
    """A conversion that goes wrong must be seen at the door: the oracle may not be made of its results."""
    adapter = read(shelf[name], base)
    for delta in adapter.deltas:
        if isinstance(delta, LoraDelta) and not name.startswith("supertuning"):  # that one is a LoRA as it is
            before = dense_delta(adapter, delta.module, base.spec)
            delta.a.add_(1.0)
            assert delta.dense is not None
            assert torch.equal(dense_delta(adapter, delta.module, base.spec), before)


def resident(base: BaseModel, adapters: list[FoldedAdapter]) -> PagedDriver:
    """All adapters at once, adapter i in slot i."""
    lora = LoraTables(len(base.linears), len(adapters), "cpu")
    sparse = SparseTables(len(base.linears), len(adapters), "cpu")
    for slot, adapter in enumerate(adapters):
        for index, name in enumerate(base.linears):
            for term in adapter.terms.get(name, ()):
                if isinstance(term, LowRankTerm):
                    lora.set(index, slot, term.a, term.b_t)
                else:
                    sparse.set(index, slot, term.indptr, term.cols, term.values)
    return PagedDriver(base, DeltaTables(lora, sparse), num_blocks=256)


def test_all_kinds_in_one_batch_equal_peft_and_folded_weights(
    model: Any, base: BaseModel, shelf: dict[str, Path], tmp_path: Path
) -> None:
    """Every kind, a LoRA and the base as rows of the same batch; each answers as PEFT does alone."""
    folders = [*shelf.values(), make_peft_lora(model, tmp_path / "lora")]
    parsed = [read(folder, base) for folder in folders]
    driver = resident(base, [fold(adapter, base.spec, torch.float32) for adapter in parsed])
    rows = [(ScheduledPart(slot),) for slot in range(len(folders))]
    found = driver.logits([list(IDS)] * (len(folders) + 1), [*rows, ()], chunk=11)
    plain = base_logits(model, IDS)
    assert torch.allclose(found[-1], plain, atol=1e-4)
    for folder, adapter, logits in zip(folders, parsed, found, strict=False):
        expected = peft_logits(model, folder, IDS)
        limit = 1e-4 * max(1.0, float(expected.square().mean().sqrt()))
        assert float((expected - plain).abs().max()) > 0.05, f"{folder.name} has no effect to compare"
        assert float((logits - expected).abs().max()) < limit, folder.name
        folded = base.folded_logits(torch.tensor(IDS), dense_deltas(adapter, base.spec))
        assert float((logits - folded).abs().max()) < limit, folder.name


def test_every_reader_has_a_case() -> None:
    converted = {kind for kind, reader in READERS.items() if reader.kind in ("lora", "sparse")}
    assert {case.config.removesuffix("Config").upper() for case in CASES.values()} == converted


@pytest.mark.parametrize("name", CASES)
def test_every_field_of_the_installed_peft_is_known(name: str) -> None:
    """A field that a newer PEFT brings is refused until it is understood; here is where one hears of it."""
    import dataclasses

    import peft

    config = getattr(peft, CASES[name].config)
    rules = READERS[config.__name__.removesuffix("Config").upper()].fields
    assert {entry.name for entry in dataclasses.fields(config)} - {"runtime_config"} <= set(rules)


def test_a_seed_is_refused_where_the_generator_draws_other_numbers(
    base: BaseModel, shelf: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vera.is_known_generator()
    monkeypatch.setattr(vera, "_KNOWN_DRAW", (0.0, 0.0, 0.0))
    with pytest.raises(AdapterInvalid) as raised:
        read(shelf["vera-seed"], base)
    assert [(reason.code, reason.where) for reason in raised.value.reasons] == [
        ("seed_not_usable", "adapter_config.json:projection_prng_key")
    ]
    read(shelf["vera"], base)


@pytest.mark.parametrize(("name", "options"), [("seed", {}), ("sparse", {}), ("thin", {}), ("thin", {"r": 64})])
def test_bases_of_a_seed_are_those_of_peft_to_the_bit(name: str, options: dict, model: Any, base: BaseModel) -> None:
    import copy

    import peft

    case = CASES[f"randlora-{name}"]
    config = peft.RandLoraConfig(target_modules=["v_proj", "up_proj"], **{**case.options, **options})
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    linears = tuple(x for n, x in base.spec.linears.items() if n.endswith(("v_proj", "up_proj")))
    a, b = randlora.RandLora(config.to_dict(), linears, "adapter_config.json")._drawn()
    for found, wanted in ((a, wrapped.base_model.randlora_A), (b, wrapped.base_model.randlora_B)):
        assert torch.equal(found.float(), wanted["default"])  # PEFT widens what it has drawn


def test_bases_of_a_seed_are_refused_where_the_generator_draws_others(
    base: BaseModel, shelf: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 and in float32 each for itself; where it draws as it did, the upload is told what that rests on."""
    told = read(shelf["randlora-seed"], base).notes
    assert ["bfloat16" in note for note in told] == [True]
    assert not read(shelf["randlora"], base).notes + read(shelf["randlora-thin"], base).notes
    for module, broken, whole in ((randlora, "seed", "sparse"), (vera, "thin", "seed")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_KNOWN_DRAW", (0.0, 0.0, 0.0))
            with pytest.raises(AdapterInvalid) as raised:
                read(shelf[f"randlora-{broken}"], base)
            assert [(reason.code, reason.where) for reason in raised.value.reasons] == [
                ("seed_not_usable", "adapter_config.json:projection_prng_key")
            ]
            read(shelf[f"randlora-{whole}"], base)
            read(shelf["randlora"], base)


def test_a_draw_of_zeros_is_no_basis(base: BaseModel, shelf: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randlora, "sparse_bases", lambda shape, sparsity, generator: torch.zeros(shape))
    with pytest.raises(AdapterInvalid) as raised:
        read(shelf["randlora-thin"], base)
    assert {(reason.code, reason.found) for reason in raised.value.reasons} == {("seed_not_usable", "bases of zeros")}


@pytest.mark.parametrize("name", ["fourierft", "waveft"])
def test_positions_are_refused_where_the_generator_draws_others(
    name: str, base: BaseModel, shelf: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the seed is applied, not only accepted."""
    other = Path(shutil.copytree(shelf[name], tmp_path / "other"))
    edit_config(other, random_loc_seed=12)
    one, two = (read(folder, base) for folder in (shelf[name], other))
    module = one.deltas[0].module
    assert not torch.equal(dense_delta(one, module, base.spec), dense_delta(two, module, base.spec))
    monkeypatch.setattr(positions, "_KNOWN_DRAW", (0, 0, 0))
    with pytest.raises(AdapterInvalid) as raised:
        read(shelf[name], base)
    assert [(reason.code, reason.where) for reason in raised.value.reasons] == [
        ("seed_not_usable", "adapter_config.json:random_loc_seed")
    ]


def test_another_seed_is_another_adapter(base: BaseModel, shelf: dict[str, Path], tmp_path: Path) -> None:
    """The seed is applied, not only accepted."""
    other = Path(shutil.copytree(shelf["vera-seed"], tmp_path / "other"))
    edit_config(other, projection_prng_key=12)
    one, two = all_of(LoraDelta, (read(folder, base).deltas[0] for folder in (shelf["vera-seed"], other)))
    assert not torch.equal(one.a, two.a)


@pytest.mark.parametrize("size", [1, 2, 7, 12, 36, 64, 97, 127, 128, 360, 4096])
@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 7, 8, 100])
def test_lokr_shapes_are_those_of_peft(size: int, factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    assert split(size, factor) == factorization(size, factor)
