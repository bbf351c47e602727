"""GLoRA on a base with biases: each of its five parts in each of its forms, as PEFT computes it, in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_deltas, fold
from deltaserve.deltas.vector_terms import VectorTerm
from deltaserve.deltas.vectors import dense_biases
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.vector_deltas import VectorDelta
from deltatest.mixed_batch import MixedBatch, distance
from deltatest.of_kind import one_of
from deltatest.peft_adapters import base_logits, peft_logits
from deltatest.peft_kinds import KindCase, write_case
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

IDS = torch.randint(3, VOCAB_SIZE, (20,), generator=torch.Generator().manual_seed(5)).tolist()
FORMS = {
    "products": ("lora", "lora", "constant"),
    "vectors": ("vector", "vector", "vector"),
    "numbers": ("constant", "none", "constant"),
    "bias alone": ("none", "lora", "vector"),
    "rows alone": ("vector", "none", "none"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = build_tiny_model("qwen2", tmp_path_factory.mktemp("base") / "tiny")
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def base(model: Any) -> BaseModel:
    folder = Path(model.config._name_or_path)
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def shelf(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("glora")
    found = {}
    for seed, (name, (rows, column, bias)) in enumerate(FORMS.items()):
        options = {"r": 2, "config_A_B": rows, "config_C": column, "config_D_E": bias}
        case = KindCase("GloraConfig", options, 0.2)
        found[name] = write_case(model, root / name, case, targets=("q_proj", "v_proj", "o_proj"), seed=seed)
    return found


def read(folder: Path, base: BaseModel) -> ParsedAdapter:
    return read_adapter(folder, base.spec).on_base(lambda name: base.linear(name).rows(0, 1 << 40))


def test_every_form_answers_as_in_peft_beside_the_others(model: Any, base: BaseModel, shelf: dict[str, Path]) -> None:
    batch = MixedBatch(base)
    parsed = {name: read(folder, base) for name, folder in shelf.items()}
    batch.load_all({name: fold(adapter, base.spec, torch.float32, base) for name, adapter in parsed.items()})
    *found, plain = batch.logits([IDS] * (len(shelf) + 1), [*shelf, None])
    assert distance(plain, base_logits(model, IDS)) < 1e-4
    for (name, folder), logits in zip(shelf.items(), found, strict=True):
        wanted = peft_logits(model, folder, IDS)
        assert distance(wanted, plain) > 0.05, f"{name} has no effect to compare"
        assert distance(logits, wanted) < 1e-4, name
        adapter = parsed[name]
        deltas = dense_deltas(adapter, base.spec, base)
        folded = base.folded_logits(torch.tensor(IDS), deltas, biases=dense_biases(adapter, base))
        assert distance(logits, folded) < 1e-4, name
    alone = batch.logits([IDS], ["vectors"])[0]
    assert torch.equal(alone, found[list(shelf).index("vectors")])
    assert torch.equal(batch.logits([IDS], [("vectors", 0.0)])[0], batch.logits([IDS], [None])[0])


def test_the_bias_of_the_base_is_multiplied_and_not_scaled_with_the_rows(base: BaseModel) -> None:
    """A scale of outputs leaves the bias alone; ``bias_scale`` is the bias's own, in the term and in the oracle."""
    module = "model.layers.0.self_attn.q_proj"
    size = base.spec.linears[module].out_features
    stored = base.linear(module).bias
    assert stored is not None
    given = VectorDelta(module, out_scale=torch.full((size,), 3.0), bias_scale=torch.full((size,), 1.5))
    adapter = ParsedAdapter("vector", "peft-glora", (given,), {}, None, None, None, size)
    term = one_of(VectorTerm, fold(adapter, base.spec, torch.float32, base).terms[module])
    assert term.scale is not None
    assert term.bias is not None
    wanted = stored.float() * 1.5
    assert torch.allclose(term.scale * stored + term.bias, wanted)
    assert torch.allclose(stored + dense_biases(adapter, base)[module](), wanted)


def test_zeros_that_are_none_are_refused(base: BaseModel, shelf: dict[str, Path], tmp_path: Path) -> None:
    """PEFT would add them, though the config says that there is nothing."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for name in ("adapter_config.json",):
        (folder / name).write_text((shelf["rows alone"] / name).read_text())
    tensors = load_file(shelf["rows alone"] / "adapter_model.safetensors")
    spoiled = "base_model.model.model.layers.0.self_attn.q_proj.glora_C.zeros"
    tensors[spoiled][3] = 0.5
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, base.spec)
    assert [(reason.code, reason.where) for reason in raised.value.reasons] == [("invalid_value", spoiled)]
