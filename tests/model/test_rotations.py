"""Rotations against PEFT, alone and in a batch of all kinds; bits where nothing may change."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.deltas.vectors import dense_biases
from deltaserve.engine.batch import ScheduledPart
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.formats import read_adapter
from deltaserve_store.rotation_deltas import RotationDelta
from deltatest.mixed_batch import MixedBatch, distance, prompts
from deltatest.peft_adapters import make_peft_ia3, make_peft_lora, make_sparse, peft_logits
from deltatest.real_engine import fold_folder
from deltatest.rotation_kinds import CASES, compiler_of, make_givens, make_rotation, whole_matrix
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

OTHERS = ("lora", "dora", "ia3", "sparse")
KINDS = (*CASES, "givens")
IDS = prompts([4 + 7 * i % 27 for i in range(1 + len(OTHERS) + len(KINDS))], VOCAB_SIZE)


@dataclass
class Setting:
    base: BaseModel
    model: torch.nn.Module
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]

    def logits(self, name: str, ids: list[int]) -> Tensor:
        """PEFT's, or those of weights turned by hand for what PEFT has no file for."""
        if name == "givens":
            model = copy.deepcopy(self.model)
            for delta in read_adapter(self.folders[name], self.base.spec).deltas:
                assert isinstance(delta, RotationDelta)
                turn(model.get_submodule(delta.module), delta)
            with torch.no_grad():
                return model(torch.tensor([ids])).logits[0]
        with compiler_of(name):
            return peft_logits(self.model, self.folders[name], ids)


@torch.no_grad()
def turn(linear: torch.nn.Module, delta: RotationDelta) -> None:
    """Put a rotation into a linear's weight, and bias, by its whole matrix."""
    weight, bias = linear.weight, linear.bias
    if delta.side == "input":
        weight.copy_(weight.double() @ whole_matrix(delta, weight.shape[1]).t())
        return
    matrix = whole_matrix(delta, weight.shape[0]).t()
    weight.copy_(matrix @ weight.double())
    if bias is not None:
        bias.copy_(matrix @ bias.double())


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A base with biases on some of its linears."""
    root = tmp_path_factory.mktemp("rotations")
    folder = build_tiny_model("qwen2", root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders = {name: make_rotation(model, root / name, name, seed=at) for at, name in enumerate(CASES)}
    folders["lora"] = make_peft_lora(model, root / "lora", rank=5, std=0.1)
    folders["dora"] = make_peft_lora(model, root / "dora", rank=3, use_dora=True)
    # The members of a group want inputs of their own.
    folders["ia3"] = make_peft_ia3(model, root / "ia3", targets=("q_proj", "v_proj"), feedforward=("q_proj",), std=0.1)
    folders["inputs"] = make_peft_ia3(model, root / "inputs", targets=("q_proj",), feedforward=("q_proj",), std=0.1)
    folders["givens"] = make_givens(base.spec, root / "givens")
    folders["sparse"] = make_sparse(base.spec, root / "sparse")
    return Setting(base, model, folders, {name: fold_folder(path, base) for name, path in folders.items()})


@pytest.mark.parametrize("name", KINDS)
def test_alone_equals_peft(setting: Setting, name: str) -> None:
    batch = MixedBatch(setting.base).load_all({name: setting.adapters[name]})
    (plain,) = batch.logits(IDS[:1], [None])
    (found,) = batch.logits(IDS[:1], [name], chunk=3)
    wanted = setting.logits(name, IDS[0])
    assert distance(wanted, plain) > 1e-2, "an adapter without effect proves nothing"
    assert distance(found, wanted) < 1e-4


def test_all_kinds_in_one_batch_equal_peft_and_change_nobody_else(setting: Setting) -> None:
    batch = MixedBatch(setting.base, num_slots=len(setting.adapters)).load_all(setting.adapters)
    names: list[str | tuple[str, float] | None] = [None, *OTHERS, *KINDS]
    found = batch.logits(IDS, names, chunk=7)
    for ids, name, logits in zip(IDS, names, found, strict=True):
        if isinstance(name, str) and name != "sparse":
            assert distance(logits, setting.logits(name, ids)) < 1e-4, name
    for ids, name, logits in zip(IDS, names, found, strict=True):  # company is not felt, to the bit
        (alone,) = batch.logits([ids], [name], chunk=7)
        assert torch.equal(logits, alone), name
    bare = MixedBatch(setting.base).load_all({name: setting.adapters[name] for name in OTHERS})
    for logits, without in zip(found, bare.logits(IDS[:5], [None, *OTHERS], chunk=7), strict=False):
        assert torch.equal(logits, without)


@pytest.mark.parametrize("name", KINDS)
def test_strength_0_is_the_base_and_others_are_what_the_proof_says(setting: Setting, name: str) -> None:
    batch = MixedBatch(setting.base).load_all({name: setting.adapters[name]})
    plain, nothing, half = batch.logits([IDS[0]] * 3, [None, (name, 0.0), (name, 0.5)])
    assert torch.equal(plain, nothing)
    adapter = read_adapter(setting.folders[name], setting.base.spec)
    wanted = setting.base.folded_logits(
        torch.tensor(IDS[0]),
        dense_deltas(adapter, setting.base.spec, setting.base, 0.5),
        {linear: (lambda make=make: make() / 2) for linear, make in dense_biases(adapter, setting.base).items()},
    )
    assert distance(half, wanted) < 1e-4
    assert distance(half, plain) > 5e-3


@pytest.mark.parametrize("name", KINDS)
def test_evicted_and_read_again_it_answers_to_the_bit(setting: Setting, name: str, tmp_path: Path) -> None:
    folded = setting.adapters[name]
    folded.save(tmp_path / "folded")
    batch = MixedBatch(setting.base).load_all({name: folded})
    assert batch.pool.used_bytes == folded.nbytes > 0
    (before,) = batch.logits(IDS[:1], [name])
    batch.reload(name, tmp_path / "folded")
    assert batch.pool.used_bytes == folded.nbytes
    assert torch.equal(batch.logits(IDS[:1], [name])[0], before)


@pytest.mark.parametrize(
    "names", [("lora", "oft"), ("lora", "road-4"), ("lora", "boft"), ("inputs", "oft"), ("oft", "oft-shared")]
)
def test_several_adapters_on_one_row(setting: Setting, names: tuple[str, str]) -> None:
    """A LoRA beside a rotation reads the input as it was; on one side, scales and rotations add up as differences of
    weights do."""
    batch = MixedBatch(setting.base).load_all({name: setting.adapters[name] for name in names})
    scales = (0.5, 1.0)
    parts = tuple(ScheduledPart(batch.slots[name], scale, scale) for name, scale in zip(names, scales, strict=True))
    found = batch.driver.logits([IDS[0]], [parts])[0]
    deltas: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for name, scale in zip(names, scales, strict=True):
        adapter = read_adapter(setting.folders[name], setting.base.spec)
        for linear, make in dense_deltas(adapter, setting.base.spec, setting.base, scale).items():
            deltas[linear] = deltas.get(linear, torch.zeros(())) + make()
        for linear, make in dense_biases(adapter, setting.base).items():
            biases[linear] = biases.get(linear, torch.zeros(())) + scale * make()
    wanted = setting.base.folded_logits(
        torch.tensor(IDS[0]),
        {linear: partial(torch.clone, delta) for linear, delta in deltas.items()},
        {linear: partial(torch.clone, bias) for linear, bias in biases.items()},
    )
    assert distance(found, wanted) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_company_is_not_felt_where_sums_are_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build_tiny_model("qwen2", tmp_path / "base")
    base = load_base(folder, dtype=dtype, cache_dir=tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders = {name: make_rotation(model, tmp_path / name, name) for name in ("oft", "road-2", "boft", "beft")}
    folders["lora"] = make_peft_lora(model, tmp_path / "lora", rank=5, std=0.1)
    adapters = {name: fold_folder(path, base) for name, path in folders.items()}
    batch = MixedBatch(base).load_all(adapters)
    names: list[str | tuple[str, float] | None] = [None, "lora", "oft", "oft", "road-2", "boft", "beft"]
    found = batch.logits(IDS[: len(names)], names)
    for ids, name, logits in zip(IDS, names, found, strict=False):
        (alone,) = MixedBatch(base).load_all(adapters).logits([ids], [name])
        assert torch.equal(logits, alone), name
        plain, nothing = batch.logits([ids, ids], [None, (str(name), 0.0) if name else None])
        assert torch.equal(plain, nothing), name
    bare = MixedBatch(base).load_all({"lora": adapters["lora"]})
    for logits, without in zip(found, bare.logits(IDS[:2], [None, "lora"]), strict=False):
        assert torch.equal(logits, without)
