"""Variants of LoRA that a config switches on: they answer as PEFT does, and what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_delta, fold
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import LoraDelta, ParsedAdapter
from deltatest.mixed_batch import MixedBatch, distance
from deltatest.of_kind import all_of
from deltatest.peft_adapters import base_logits, edit_config, make_peft_lora, peft_logits
from deltatest.tiny_models import build_tiny_model

IDS = torch.randint(3, 199, (20,), generator=torch.Generator().manual_seed(5)).tolist()
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _options(name: str) -> dict[str, Any]:
    from peft.tuners.lora import config

    return {
        "kasa": {"kasa_config": config.KasaConfig(), "rank_pattern": {"v_proj": 2}},
        "blocks": {
            "use_bdlora": config.BdLoraConfig(["down_proj"], ["self_attn"], nblocks=2),
            "rank_pattern": {"v_proj": 2},
        },
        "some blocks": {"use_bdlora": config.BdLoraConfig(None, ["q_proj"], nblocks=4, match_strict=False)},
        "velora": {"velora_config": config.VeloraConfig(num_groups=16)},
        "monteclora": {"monteclora_config": config.MontecloraConfig()},
        "mica": {"init_lora_weights": "mica"},
    }[name]


NAMES = ("kasa", "blocks", "some blocks", "velora", "monteclora", "mica")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = build_tiny_model("llama", tmp_path_factory.mktemp("base") / "tiny")
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def model(base: BaseModel) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.folder).eval()


def make(name: str, model: Any, folder: Path) -> Path:
    targets = ("q_proj", "v_proj", "down_proj")
    return make_peft_lora(model, folder, rank=4, targets=targets, std=0.2, seed=3, **_options(name))


@pytest.fixture(scope="module")
def shelf(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {name: make(name, model, root / name) for name in NAMES}


def read(folder: Path, base: BaseModel) -> ParsedAdapter:
    return read_adapter(folder, base.spec).on_base(lambda name: base.linear(name).rows(0, 1 << 40))


def test_every_variant_answers_as_in_peft_beside_the_others(
    model: Any, base: BaseModel, shelf: dict[str, Path]
) -> None:
    parsed = {name: read(folder, base) for name, folder in shelf.items()}
    folded = {name: fold(adapter, base.spec, torch.float32) for name, adapter in parsed.items()}
    *found, plain = MixedBatch(base).load_all(folded).logits([IDS] * (len(shelf) + 1), [*shelf, None])
    assert distance(plain, base_logits(model, IDS)) < 1e-4
    for (name, folder), logits in zip(shelf.items(), found, strict=True):
        wanted = peft_logits(model, folder, IDS)
        assert distance(wanted, plain) > 0.3, f"{name} has no effect to compare"
        assert distance(logits, wanted) < 1e-4 * max(1.0, float(wanted.square().mean().sqrt())), name
        for module in folded[name].terms:
            run = dense_delta(folded[name], module, base.spec)
            formula = dense_delta(parsed[name], module, base.spec)
            assert float((run - formula).abs().max()) < 1e-5, (name, module)


def test_the_formula_for_the_proof_is_not_what_is_run(base: BaseModel, shelf: dict[str, Path]) -> None:
    for name in ("kasa", "blocks"):
        adapter = read(shelf[name], base)
        for delta in all_of(LoraDelta, adapter.deltas):
            before = dense_delta(adapter, delta.module, base.spec)
            is_of_file = name == "blocks" and "self_attn" in delta.module
            (delta.b if is_of_file else delta.a).add_(1.0)
            assert torch.equal(dense_delta(adapter, delta.module, base.spec), before)


def test_parameters_are_those_of_the_file(base: BaseModel, shelf: dict[str, Path]) -> None:
    for name in ("kasa", "blocks", "mica"):
        tensors = load_file(shelf[name] / TENSORS)
        assert read(shelf[name], base).num_parameters == sum(tensor.numel() for tensor in tensors.values())


def _edit(name: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value
        save_file(tensors, folder / TENSORS)

    return spoil


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def _blocks(**changes: Any) -> Callable[[Path], None]:
    told = {"nblocks": 2, "target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["self_attn"]}
    return _config(use_bdlora={**told, **changes})


PLACE = f"{CONFIG}:use_bdlora"
BAD = {
    "no diagonal": ("kasa", _edit(f"{Q}.lora_diag", None), "missing_tensor", f"{Q}.lora_diag"),
    "a long diagonal": ("kasa", _edit(f"{Q}.lora_diag", torch.ones(5)), "shape_mismatch", f"{Q}.lora_diag"),
    "a diagonal of NaN": ("kasa", _edit(f"{Q}.lora_diag", torch.full((4,), torch.nan)), "non_finite", f"{Q}.lora_diag"),
    "a diagonal untold": ("kasa", _config(kasa_config=None), "unknown_module", f"{Q}.lora_diag"),
    "KaSA with DoRA": ("kasa", _config(use_dora=True), "unsupported_feature", f"{CONFIG}:use_dora"),
    "KaSA with PiSSA": ("kasa", _config(init_lora_weights="pissa"), "unsupported_feature", f"{CONFIG}:kasa_config"),
    "KaSA that is a word": ("kasa", _config(kasa_config="yes"), "invalid_value", f"{CONFIG}:kasa_config"),
    "other blocks": ("blocks", _blocks(nblocks=1), "shape_mismatch", f"{Q}.lora_B.weight"),
    "blocks of no size": ("blocks", _blocks(nblocks=0), "invalid_value", PLACE),
    "blocks that do not divide": ("blocks", _blocks(nblocks=3), "invalid_value", PLACE),
    "a linear on both sides": ("blocks", _blocks(target_modules_bd_a=["proj"]), "invalid_value", PLACE),
    "a linear on no side": ("blocks", _blocks(target_modules_bd_a=[]), "invalid_value", PLACE),
    "a word that is unknown": ("blocks", _blocks(shards=2), "invalid_value", PLACE),
    "blocks of KaSA": ("blocks", _config(kasa_config={}), "invalid_value", PLACE),
    "numbers for training untold": (
        "velora",
        _config(velora_config=None),
        "unknown_module",
        f"{Q}.lora_velora_embed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case: str, model: Any, base: BaseModel, tmp_path: Path) -> None:
    name, spoil, code, where = BAD[case]
    folder = make(name, model, tmp_path / "a")
    spoil(folder)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, base.spec)
    assert (code, where) in [(reason.code, reason.where) for reason in raised.value.reasons]


def test_components_that_singular_values_leave_open_are_refused(base: BaseModel, shelf: dict[str, Path]) -> None:
    def weight_of(name: str) -> torch.Tensor:
        left, sizes, right = torch.linalg.svd(base.linear(name).rows(0, 1 << 40), full_matrices=False)
        sizes[-5:] = sizes[-5]
        return (left * sizes) @ right

    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(shelf["kasa"], base.spec).on_base(weight_of)
    assert [reason.code for reason in raised.value.reasons] == ["seed_not_usable"]
