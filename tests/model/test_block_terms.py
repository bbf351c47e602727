"""Row and column blocks against folded weights, alone and in a batch of all kinds; bits where nothing may change."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.engine.batch import ScheduledPart
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.block_deltas import BlockDelta
from deltaserve_store.formats import read_adapter
from deltatest.block_adapters import KINDS, make_blocks
from deltatest.mixed_batch import MixedBatch, distance, prompts
from deltatest.peft_adapters import make_peft_lora, make_sparse
from deltatest.real_engine import fold_folder
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model
from deltatest.vocabulary_adapters import make_vocabulary_adapter

torch.set_num_threads(1)

IDS = prompts((21, 9, 30, 1, 17, 12, 8, 14, 11), VOCAB_SIZE)


@dataclass
class Setting:
    base: BaseModel
    model: torch.nn.Module
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]

    def logits(self, kind: str, ids: list[int]) -> Tensor:
        """Those of transformers with the blocks put into the weights, entry by entry of the file."""
        model = copy.deepcopy(self.model)
        spec = self.base.spec
        with torch.no_grad():
            for delta in read_adapter(self.folders[kind], spec).deltas:
                assert isinstance(delta, BlockDelta)
                module: Any = model.get_submodule(delta.module)
                weight = module.weight.t() if spec.linears[delta.module].transposed else module.weight
                rows = range(weight.shape[0]) if delta.out_rows is None else delta.out_rows.tolist()
                cols = torch.arange(weight.shape[1]) if delta.in_cols is None else delta.in_cols.long()
                for place, row in enumerate(rows):
                    weight[row, cols] += delta.values[place]
            return model(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("blocks")
    folder = build_tiny_model(request.param, root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    is_conv = request.param == "gpt2"
    target, norm = ("c_attn", "ln_f") if is_conv else ("q_proj", "norm")
    folders = {kind: make_blocks(kind, base.spec, root / kind, seed=seed) for seed, kind in enumerate(KINDS)}
    folders["lora"] = make_peft_lora(model, root / "lora", rank=5, targets=[target], fan_in_fan_out=is_conv, std=0.1)
    folders["dora"] = make_peft_lora(
        model, root / "dora", rank=3, targets=[target], fan_in_fan_out=is_conv, use_dora=True
    )
    folders["sparse"] = make_sparse(base.spec, root / "sparse", targets=[target])
    folders["tokens"] = make_vocabulary_adapter(
        "tokens", model, root / "tokens", target=target, norm=norm, is_conv=is_conv
    )
    return Setting(base, model, folders, {kind: fold_folder(path, base) for kind, path in folders.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_alone_equals_folded_weights(setting: Setting, kind: str) -> None:
    batch = MixedBatch(setting.base).load_all({kind: setting.adapters[kind]})
    (plain,) = batch.logits(IDS[:1], [None])
    (found,) = batch.logits(IDS[:1], [kind], chunk=8)
    wanted = setting.logits(kind, IDS[0])
    assert distance(wanted, plain) > 1e-2, "an adapter without effect proves nothing"
    assert distance(found, wanted) < 1e-4


def test_all_kinds_in_one_batch_are_what_they_are_alone(setting: Setting) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    names: list[str | tuple[str, float] | None] = [None, *setting.adapters]
    found = batch.logits(IDS[: len(names)], names, chunk=7)
    for ids, name, logits in zip(IDS, names, found, strict=False):
        if isinstance(name, str) and name in KINDS:
            assert distance(logits, setting.logits(name, ids)) < 1e-4, name
        (alone,) = batch.logits([ids], [name], chunk=7)  # company is not felt, to the bit
        assert torch.equal(logits, alone), name
    others = {name: adapter for name, adapter in setting.adapters.items() if name not in KINDS}
    bare = MixedBatch(setting.base).load_all(others)
    kept = [i for i, name in enumerate(names) if name not in KINDS]
    for i, without in zip(kept, bare.logits([IDS[i] for i in kept], [names[i] for i in kept], chunk=7), strict=True):
        assert torch.equal(found[i], without), names[i]


@pytest.mark.parametrize("kind", KINDS)
def test_strength_and_reload(setting: Setting, kind: str, tmp_path: Path) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    plain, nothing, half, whole = batch.logits([IDS[0]] * 4, [None, (kind, 0.0), (kind, 0.5), kind])
    assert torch.equal(plain, nothing)
    deltas = dense_deltas(read_adapter(setting.folders[kind], setting.base.spec), setting.base.spec)
    halved = {name: (lambda make=make: make() / 2) for name, make in deltas.items()}
    assert distance(half, setting.base.folded_logits(torch.tensor(IDS[0]), halved)) < 1e-4
    used = batch.pool.used_bytes
    setting.adapters[kind].save(tmp_path / "folded")
    batch.reload(kind, tmp_path / "folded")
    assert batch.pool.used_bytes == used
    assert torch.equal(batch.logits(IDS[:1], [kind])[0], whole)


def test_blocks_and_other_kinds_on_one_row(setting: Setting) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    names, scales = ("s2ft", "lora", "both", "sparse"), (1.0, 0.5, 0.25, 1.0)
    parts = tuple(ScheduledPart(batch.slots[name], scale, scale) for name, scale in zip(names, scales, strict=True))
    found = batch.driver.logits([IDS[0]], [parts])[0]
    deltas: dict[str, Tensor] = {}
    for name, scale in zip(names, scales, strict=True):
        adapter = read_adapter(setting.folders[name], setting.base.spec)
        for module, make in dense_deltas(adapter, setting.base.spec, setting.base).items():
            deltas[module] = deltas.get(module, torch.zeros(())) + scale * make()
    wanted = setting.base.folded_logits(torch.tensor(IDS[0]), {name: (lambda n=name: deltas[n]) for name in deltas})
    assert distance(found, wanted) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_company_is_not_felt_where_sums_are_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build_tiny_model("qwen2", tmp_path / "base")
    base = load_base(folder, dtype=dtype, cache_dir=tmp_path / "cache")
    folders = {kind: make_blocks(kind, base.spec, tmp_path / kind) for kind in ("cols", "s2ft")}
    adapters = {kind: fold_folder(path, base) for kind, path in folders.items()}
    batch = MixedBatch(base).load_all(adapters)
    names: list[str | tuple[str, float] | None] = [None, *adapters]
    for ids, name, logits in zip(IDS, names, batch.logits(IDS[:3], names), strict=False):
        (alone,) = MixedBatch(base).load_all(adapters).logits([ids], [name])
        assert torch.equal(logits, alone), name
