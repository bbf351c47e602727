"""Scales, biases and norm deltas against PEFT, alone and in a batch of all kinds; bits where nothing may change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.deltas.vectors import dense_biases, dense_norms
from deltaserve.engine.batch import ScheduledPart
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.formats import read_adapter
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltatest.mixed_batch import MixedBatch, distance, prompts
from deltatest.peft_adapters import (
    make_bitfit,
    make_gates,
    make_peft_ia3,
    make_peft_ln_tuning,
    make_peft_lora,
    make_sparse,
    peft_logits,
)
from deltatest.real_engine import fold_folder
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

IDS = prompts((21, 9, 30, 1, 17, 12, 8, 14, 11, 6, 19), VOCAB_SIZE)
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEARS = {"gpt2": ("c_attn", "c_fc", "mlp.c_proj")}
INWARD = {"gpt2": ("mlp.c_proj",)}
NORMS = {
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gemma2": ("input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"),
}
OWN_KINDS = ("bitfit", "gates")
KINDS = ("dora", "biases", "lora-bias", "ia3", "ia3-inputs", "norms")


def make(kind: str, arch: str, model: torch.nn.Module, folder: Path) -> Path:
    targets, is_conv = LINEARS.get(arch, LLAMA_LINEARS), arch == "gpt2"
    inward = INWARD.get(arch, ("down_proj",))
    if kind == "lora":
        return make_peft_lora(model, folder, rank=5, targets=targets, fan_in_fan_out=is_conv, std=0.1, seed=3)
    if kind == "dora":
        return make_peft_lora(model, folder, rank=3, targets=targets, fan_in_fan_out=is_conv, use_dora=True, bias="all")
    if kind == "biases":
        return make_peft_lora(model, folder, rank=3, targets=targets[:2], fan_in_fan_out=is_conv, bias="lora_only")
    if kind == "lora-bias":
        return make_peft_lora(model, folder, rank=3, targets=targets, fan_in_fan_out=is_conv, lora_bias=True)
    if kind == "ia3":
        return make_peft_ia3(model, folder, targets=targets, feedforward=inward, std=0.1)
    if kind == "ia3-inputs":  # the members of a group want inputs of their own
        return make_peft_ia3(model, folder, targets=targets, feedforward=targets[:2], std=0.1)
    return make_peft_ln_tuning(model, folder, targets=NORMS.get(arch, ("input_layernorm", "norm")), std=0.1)


@dataclass
class Setting:
    base: BaseModel
    model: torch.nn.Module
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]

    def logits(self, kind: str, ids: list[int]) -> Tensor:
        """PEFT's, or those of weights changed by hand for what PEFT has no file for."""
        if kind not in OWN_KINDS:
            return peft_logits(self.model, self.folders[kind], ids)
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for delta in read_adapter(self.folders[kind], self.base.spec).deltas:
                change(model, delta, self.base.spec)
            return model(torch.tensor([ids])).logits[0]


def change(model: torch.nn.Module, delta: VectorDelta | NormDelta, spec: BaseSpec) -> None:
    """Put one vector of the project's own format into the weights."""
    module: Any = model.get_submodule(delta.module)
    if isinstance(delta, NormDelta):
        module.weight += 0 if delta.gain is None else delta.gain
        if delta.shift is not None:
            module.bias += delta.shift
        return
    weight = module.weight.t() if spec.linears[delta.module].transposed else module.weight
    if delta.out_scale is not None:
        weight *= delta.out_scale[:, None]
    if delta.in_scale is not None:
        weight *= delta.in_scale
    if delta.bias is not None:
        module.bias = torch.nn.Parameter(delta.bias + (0 if module.bias is None else module.bias))


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2", "gemma2"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("vectors")
    folder = build_tiny_model(request.param, root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders = {kind: make(kind, request.param, model, root / kind) for kind in ("lora", *KINDS)}
    endings = [name.rsplit(".", 1)[-1] for name in base.linears]
    make_bitfit(base.spec, root / "bitfit")
    make_gates(base.spec, root / "gates")
    folders |= {kind: root / kind for kind in OWN_KINDS}
    folders["sparse"] = make_sparse(base.spec, root / "sparse", targets=endings)
    return Setting(base, model, folders, {kind: fold_folder(path, base) for kind, path in folders.items()})


@pytest.mark.parametrize("kind", [*KINDS, *OWN_KINDS])
def test_alone_equals_peft(setting: Setting, kind: str) -> None:
    batch = MixedBatch(setting.base).load_all({kind: setting.adapters[kind]})
    (plain,) = batch.logits(IDS[:1], [None])
    (found,) = batch.logits(IDS[:1], [kind], chunk=8)
    wanted = setting.logits(kind, IDS[0])
    assert distance(wanted, plain) > 1e-2, "an adapter without effect proves nothing"
    assert distance(found, wanted) < 1e-4


def test_all_kinds_in_one_batch_equal_peft_and_change_nobody_else(setting: Setting) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    names: list[str | tuple[str, float] | None] = [None, "lora", "sparse", *KINDS, *OWN_KINDS]
    found = batch.logits(IDS, names, chunk=7)
    for ids, name, logits in zip(IDS, names, found, strict=True):
        if isinstance(name, str) and name != "sparse":
            assert distance(logits, setting.logits(name, ids)) < 1e-4, name
    for i, name in enumerate(names):  # company is not felt, to the bit: by rows with vectors or without
        (alone,) = batch.logits([IDS[i]], [name], chunk=7)
        assert torch.equal(found[i], alone), name
    bare = MixedBatch(setting.base).load_all({name: setting.adapters[name] for name in ("lora", "sparse")})
    for logits, without in zip(found, bare.logits(IDS[:3], [None, "lora", "sparse"], chunk=7), strict=False):
        assert torch.equal(logits, without)


@pytest.mark.parametrize("kind", [*KINDS, *OWN_KINDS])
def test_strength(setting: Setting, kind: str) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    plain, nothing, half = batch.logits([IDS[0]] * 3, [None, (kind, 0.0), (kind, 0.5)])
    assert torch.equal(plain, nothing)
    adapter = read_adapter(setting.folders[kind], setting.base.spec)
    deltas = dense_deltas(adapter, setting.base.spec, setting.base)
    norms = dense_norms(adapter, setting.base)
    wanted = setting.base.folded_logits(
        torch.tensor(IDS[0]),
        {name: halved(made) for name, made in deltas.items()},
        {name: halved(made) for name, made in dense_biases(adapter, setting.base).items()},
        {name: (w if w is None else w / 2, b if b is None else b / 2) for name, (w, b) in norms.items()},
    )
    assert distance(half, wanted) < 1e-4
    assert distance(half, plain) > 5e-3


def halved(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: make() / 2


@pytest.mark.parametrize("kind", [*KINDS, *OWN_KINDS])
def test_evicted_and_read_again_it_answers_to_the_bit(setting: Setting, kind: str, tmp_path: Path) -> None:
    setting.adapters[kind].save(tmp_path / "folded")
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    used = batch.pool.used_bytes
    (before,) = batch.logits(IDS[:1], [kind])
    batch.reload(kind, tmp_path / "folded")
    assert batch.pool.used_bytes == used
    assert torch.equal(batch.logits(IDS[:1], [kind])[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_company_is_not_felt_where_sums_are_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    """Rows with vectors leave the fused product of base and low rank: that may change nobody's bits."""
    folder = build_tiny_model("qwen2", tmp_path / "base")
    base = load_base(folder, dtype=dtype, cache_dir=tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders = {kind: make(kind, "qwen2", model, tmp_path / kind) for kind in ("lora", *KINDS)}
    adapters = {kind: fold_folder(path, base) for kind, path in folders.items()}
    batch = MixedBatch(base).load_all(adapters)
    names: list[str | tuple[str, float] | None] = [None, "lora", *KINDS]
    found = batch.logits(IDS[: len(names)], names)
    for ids, name, logits in zip(IDS, names, found, strict=False):
        (alone,) = MixedBatch(base).load_all(adapters).logits([ids], [name])
        assert torch.equal(logits, alone), name
        plain, nothing = batch.logits([ids, ids], [None, (str(name), 0.0) if name else None])
        assert torch.equal(plain, nothing), name
    bare = MixedBatch(base).load_all({"lora": adapters["lora"]})
    for logits, without in zip(found, bare.logits(IDS[:2], [None, "lora"]), strict=False):
        assert torch.equal(logits, without)


def test_several_adapters_with_vectors_on_one_row(setting: Setting) -> None:
    """Scales of one side add up as differences of weights do, and low rank, biases and norms stack."""
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    names, scales = ("lora", "dora", "lora-bias", "norms"), (1.0, 0.5, 0.25, 1.0)
    parts = tuple(ScheduledPart(batch.slots[name], scale, scale) for name, scale in zip(names, scales, strict=True))
    found = batch.driver.logits([IDS[0]], [parts])[0]
    deltas: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    norms: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for name, scale in zip(names, scales, strict=True):
        adapter = read_adapter(setting.folders[name], setting.base.spec)
        for module, made in dense_deltas(adapter, setting.base.spec, setting.base).items():
            deltas[module] = deltas.get(module, torch.zeros(())) + scale * made()
        for module, made in dense_biases(adapter, setting.base).items():
            biases[module] = biases.get(module, torch.zeros(())) + scale * made()
        for norm, (weight, bias) in dense_norms(adapter, setting.base).items():
            before = norms.get(norm, (None, None))
            norms[norm] = _sum(before[0], weight, scale), _sum(before[1], bias, scale)
    wanted = setting.base.folded_logits(
        torch.tensor(IDS[0]),
        {name: (lambda n=name: deltas[n]) for name in deltas},
        {name: (lambda n=name: biases[n]) for name in biases},
        norms,
    )
    assert distance(found, wanted) < 1e-4


def _sum(before: Tensor | None, change: Tensor | None, scale: float) -> Tensor | None:
    if change is None:
        return before
    return scale * change if before is None else before + scale * change
