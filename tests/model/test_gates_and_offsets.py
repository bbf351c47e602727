"""Gates of rows and columns (FineGates) and offsets of attention heads (LoFiT) in the project's own vectors format."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.vectors import dense_biases
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.deltaserve_vectors import write_vector_adapter
from deltaserve_store.vector_deltas import VectorDelta
from deltatest.mixed_batch import MixedBatch, distance, prompts
from deltatest.peft_adapters import base_logits
from deltatest.real_engine import fold_folder
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

IDS = prompts((21, 9, 14), VOCAB_SIZE)
KINDS = ("gates", "offsets")
HEADS, HEAD_DIM = 4, 16


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Setting:
    base: BaseModel
    model: nn.Module
    deltas: dict[str, list[VectorDelta]]
    folders: dict[str, Path]

    def logits(self, kind: str, ids: list[int], strength: float = 1.0) -> Tensor:
        """transformers' model with masked weights, or with hooks that move the heads' outputs."""
        model: Any = copy.deepcopy(self.model)
        for delta in self.deltas[kind]:
            linear = model.get_submodule(delta.module)
            if delta.in_bias is not None:
                offset = strength * delta.in_bias
                linear.register_forward_pre_hook(lambda _, args, offset=offset: (args[0] + offset,))
                continue
            assert delta.out_scale is not None
            assert delta.in_scale is not None
            with torch.no_grad():
                linear.weight *= (1 + strength * (delta.out_scale - 1))[:, None]
                linear.weight *= 1 + strength * (delta.in_scale - 1)
        return base_logits(model, ids)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Qwen2: q, k and v have biases, which gates leave alone. Gates of 0 and 1 on every linear; two heads moved."""
    root = tmp_path_factory.mktemp("gates")
    folder = build_tiny_model("qwen2", root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    gates, offsets = [], []
    for seed, (name, linear) in enumerate(base.spec.linears.items()):
        rows, columns = randn(linear.out_features, seed=seed) < 1.2, randn(linear.in_features, seed=seed + 50) < 1.2
        gates.append(VectorDelta(name, out_scale=rows.float(), in_scale=columns.float()))
        if name.endswith("o_proj"):
            moved = torch.zeros(HEADS, HEAD_DIM)
            moved[[1, 3]] = randn(2, HEAD_DIM, seed=seed)
            offsets.append(VectorDelta(name, in_bias=moved.flatten()))
    deltas = {"gates": gates, "offsets": offsets}
    for kind, given in deltas.items():
        write_vector_adapter(root / kind, given, base.spec.fingerprint, method=kind)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return Setting(base, model, deltas, {kind: root / kind for kind in KINDS})


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_in_one_batch_each_equals_the_changed_model(setting: Setting, strength: float) -> None:
    adapters = {kind: fold_folder(setting.folders[kind], setting.base) for kind in KINDS}
    batch = MixedBatch(setting.base).load_all(adapters)
    found = batch.logits(IDS, [None, *((kind, strength) for kind in KINDS)], chunk=8)
    (plain,) = MixedBatch(setting.base).logits(IDS[:1], [None], chunk=8)
    assert torch.equal(found[0], plain)
    for kind, ids, logits in zip(KINDS, IDS[1:], found[1:], strict=True):
        assert distance(logits, setting.logits(kind, ids, strength)) < 1e-4
        assert distance(logits, base_logits(setting.model, ids)) > 1e-1, "an adapter without effect proves nothing"
        assert torch.equal(*batch.logits([ids, ids], [None, (kind, 0.0)]))


@pytest.mark.parametrize("strength", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_s_half_has_the_same_strength(setting: Setting, kind: str, strength: float) -> None:
    base, adapter = setting.base, read_adapter(setting.folders[kind], setting.base.spec)
    biases = {name: (lambda m=made: m() * strength) for name, made in dense_biases(adapter, base).items()}
    deltas = dense_deltas(adapter, base.spec, base, strength)
    found = base.folded_logits(torch.tensor(IDS[0]), deltas, biases)
    assert distance(found, setting.logits(kind, IDS[0], strength)) < 1e-4
