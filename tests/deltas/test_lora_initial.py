"""LoRA whose training changed the base at its start: on the base itself it answers as PEFT does with the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_delta, fold
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.lora_initial import RECOMPUTED, residual_delta
from deltaserve_store.parsed import LoraDelta, ParsedAdapter
from deltaserve_store.spec import LinearSpec
from deltatest.adapter_corpus import PREFIX, TENSORS, corpus_base, write_good_lora
from deltatest.mixed_batch import MixedBatch, distance
from deltatest.peft_adapters import base_logits, edit_config, make_peft_lora, peft_logits
from deltatest.tiny_models import build_tiny_model

IDS = torch.randint(3, 199, (24,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def model(base_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base_folder).eval()


@pytest.fixture(scope="module")
def base(base_folder: Path) -> BaseModel:
    return load_base(base_folder, dtype=torch.float32, cache_dir=base_folder / "cache")


def _read(folder: Path, base: BaseModel) -> ParsedAdapter:
    def weight_of(name: str) -> torch.Tensor:
        return base.linear(name).rows(0, base.spec.linears[name].out_features)

    return read_adapter(folder, base.spec).on_base(weight_of)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}], ids=["plain", "patterns"]
)
@pytest.mark.parametrize("method", RECOMPUTED)
def test_the_base_itself_answers_as_peft_does_on_what_is_left_of_it(
    method: str, options: dict[str, Any], model: Any, base: BaseModel, tmp_path: Path
) -> None:
    folder = make_peft_lora(model, tmp_path / "a", rank=4, init_lora_weights=method, seed=3, std=0.2, **options)
    adapter = _read(folder, base)
    assert adapter.rank == 8
    folded = fold(adapter, base.spec, torch.float32)
    for name in folded.terms:
        error = dense_delta(folded, name, base.spec) - dense_delta(adapter, name, base.spec)
        assert float(error.abs().max()) < 1e-5, "the formula of the proof goes another way to the same matrix"
    batch = MixedBatch(base)
    batch.load("a", folded)
    found = batch.logits([IDS, IDS], ["a", None])
    expected = peft_logits(model, folder, IDS)
    assert distance(expected, base_logits(model, IDS)) > 0.3
    assert distance(found[0], expected) < 1e-4
    assert distance(found[1], base_logits(model, IDS)) < 1e-4


def test_untrained_pissa_changes_nothing(model: Any, base: BaseModel, tmp_path: Path) -> None:
    """What was taken out is still in the factors: served, they give the base back."""
    import peft

    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder), config)
    wrapped.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    (tmp_path / "a" / "README.md").unlink(missing_ok=True)
    adapter = _read(tmp_path / "a", base)
    for delta in adapter.deltas:
        assert float(dense_delta(adapter, delta.module, base.spec).abs().max()) < 1e-5


@pytest.mark.parametrize("method", RECOMPUTED)
def test_a_base_that_leaves_the_part_open_is_refused(method: str) -> None:
    weight = torch.eye(6) if method == "pissa" else torch.ones(6, 6)
    delta = residual_delta(LoraDelta("m", torch.ones(2, 6), torch.ones(6, 2), 1.0), method)
    with pytest.raises(AdapterInvalid) as caught:
        delta.on(lambda name: weight)
    (reason,) = caught.value.reasons
    assert (reason.code, reason.where) == ("seed_not_usable", "m")
    assert "path_initial_model_for_weight_conversion" in reason.allowed


@pytest.mark.parametrize(("size", "rank"), [(8, 9), (600, 513)])
@pytest.mark.parametrize("method", [*RECOMPUTED, "kasa"])
def test_ranks_above_the_linears_or_above_half_of_what_is_served_are_refused(
    method: str, size: int, rank: int, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    base = replace(corpus_base(), linears={name: LinearSpec(name, size, size, False, False)})
    own = {"kasa_config": {}} if method == "kasa" else {"init_lora_weights": method}
    folder = edit_config(write_good_lora(tmp_path / "a"), r=rank, target_modules=["q_proj"], **own)
    tensors = {"A.weight": torch.ones(rank, size), "B.weight": torch.ones(size, rank)}
    if method == "kasa":
        tensors["diag"] = torch.ones(rank)
    save_file({f"{PREFIX}{name}.lora_{part}": values for part, values in tensors.items()}, folder / TENSORS)
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter(folder, base)
    assert [(reason.code, reason.where) for reason in caught.value.reasons] == [
        ("rank_out_of_range", "adapter_config.json:r")
    ]
