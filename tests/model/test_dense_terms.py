"""Differences of whole weights, full and packed, against changed weights; bits where nothing may be felt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deltaserve.deltas.dense import DenseTerm
from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.folded import FoldedAdapter, SparseTerm
from deltaserve.deltas.vectors import dense_biases, dense_norms
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.formats import read_adapter
from deltatest.apart_adapters import changed_model, make_bottleneck, make_dense
from deltatest.mixed_batch import MixedBatch, distance, prompts
from deltatest.peft_adapters import base_logits, make_gates, make_sparse
from deltatest.real_engine import fold_folder
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

IDS = prompts((21, 9, 30, 1, 17, 12, 8, 11), VOCAB_SIZE)
KINDS = ("delta", "mask", "thick-mask", "signs")


@dataclass
class Setting:
    base: BaseModel
    model: nn.Module
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]

    def logits(self, kind: str, ids: list[int]) -> Tensor:
        deltas = read_adapter(self.folders[kind], self.base.spec).deltas
        return base_logits(changed_model(self.model, deltas, self.base.spec), ids)


@pytest.fixture(scope="module", params=["qwen2", "gpt2"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("dense")
    folder = build_tiny_model(request.param, root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders = {kind: make_dense(base.spec, root / kind, kind) for kind in KINDS}
    folders |= {
        "sparse": make_sparse(base.spec, root / "sparse", targets=[n.rsplit(".", 1)[-1] for n in base.linears]),
        "gates": make_gates(base.spec, root / "gates"),
        "bottleneck": make_bottleneck(base.spec, root / "bottleneck"),
    }
    return Setting(base, model, folders, {kind: fold_folder(path, base) for kind, path in folders.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_alone_equals_changed_weights(setting: Setting, kind: str) -> None:
    batch = MixedBatch(setting.base).load_all({kind: setting.adapters[kind]})
    (plain,) = batch.logits(IDS[:1], [None])
    (found,) = batch.logits(IDS[:1], [kind], chunk=8)
    wanted = setting.logits(kind, IDS[0])
    assert distance(wanted, plain) > 1e-1, "an adapter without effect proves nothing"
    assert distance(found, wanted) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_folded_is_what_the_file_says(setting: Setting, kind: str) -> None:
    spec = setting.base.spec
    folded = dense_deltas(setting.adapters[kind], spec, setting.base)
    wanted = dense_deltas(read_adapter(setting.folders[kind], spec), spec, setting.base)
    for name, made in wanted.items():
        torch.testing.assert_close(folded[name](), made(), atol=1e-6, rtol=0)


def test_thin_masks_become_entries_and_thick_ones_stay_bits_as_signs_do(setting: Setting) -> None:
    def forms(kind: str) -> set[type]:
        return {type(term) for terms in setting.adapters[kind].terms.values() for term in terms}

    assert forms("mask") == {SparseTerm}
    assert forms("thick-mask") == forms("signs") == {DenseTerm}
    linears = list(setting.base.spec.linears.values())[::2]
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    rows = sum(linear.out_features for linear in linears)
    batch = MixedBatch(setting.base).load_all({"signs": setting.adapters["signs"]})
    assert batch.pool.used_bytes == weights // 8 + 4 * rows  # one bit a weight and a scale a row
    masked = MixedBatch(setting.base).load_all({"thick-mask": setting.adapters["thick-mask"]})
    assert masked.pool.used_bytes == weights // 8
    assert setting.adapters["thick-mask"].nbytes == weights // 8  # in the host's tier alike


def test_all_kinds_in_one_batch_equal_changed_weights_and_change_nobody_else(setting: Setting) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    names: list[str | tuple[str, float] | None] = [None, "sparse", "gates", "bottleneck", *KINDS]
    found = batch.logits(IDS, names, chunk=7)
    for ids, name, logits in zip(IDS, names, found, strict=True):
        if name in KINDS:
            assert distance(logits, setting.logits(str(name), ids)) < 1e-4, name
    for i, name in enumerate(names):  # company is not felt, to the bit
        assert torch.equal(found[i], batch.logits([IDS[i]], [name], chunk=7)[0]), name
    others = {name: setting.adapters[name] for name in ("sparse", "gates")}
    bare = MixedBatch(setting.base).load_all(others).logits(IDS[:3], [None, *others], chunk=7)
    for logits, without in zip(found, bare, strict=False):
        assert torch.equal(logits, without)


@pytest.mark.parametrize("kind", KINDS)
def test_strength(setting: Setting, kind: str) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    plain, nothing, half = batch.logits([IDS[0]] * 3, [None, (kind, 0.0), (kind, 0.5)])
    assert torch.equal(plain, nothing)
    adapter, base = read_adapter(setting.folders[kind], setting.base.spec), setting.base
    deltas = {name: partial(halved, made) for name, made in dense_deltas(adapter, base.spec, base).items()}
    biases = {name: partial(halved, made) for name, made in dense_biases(adapter, base).items()}
    norms = {name: (None if gain is None else gain / 2, None) for name, (gain, _) in dense_norms(adapter, base).items()}
    wanted = base.folded_logits(torch.tensor(IDS[0]), deltas, biases, norms)
    assert distance(half, wanted) < 1e-4
    assert distance(half, plain) > 1e-2


def halved(make: Callable[[], Tensor]) -> Tensor:
    return make() / 2


@pytest.mark.parametrize("kind", KINDS)
def test_evicted_and_read_again_it_answers_to_the_bit(setting: Setting, kind: str, tmp_path: Path) -> None:
    setting.adapters[kind].save(tmp_path / "folded")
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    used = batch.pool.used_bytes
    (before,) = batch.logits(IDS[:1], [kind])
    batch.reload(kind, tmp_path / "folded")
    assert batch.pool.used_bytes == used
    assert torch.equal(batch.logits(IDS[:1], [kind])[0], before)
    batch.pool.release(batch.slots.pop(kind))  # and after it nothing is left of it
    batch.slots["empty"] = batch.pool.reserve("empty", 0)
    assert torch.equal(*batch.logits(IDS[:1] * 2, ["empty", None]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_company_is_not_felt_where_sums_are_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    base = load_base(build_tiny_model("llama", tmp_path / "base"), dtype=dtype, cache_dir=tmp_path / "cache")
    folders = {kind: make_dense(base.spec, tmp_path / kind, kind) for kind in KINDS}
    folders["sparse"] = make_sparse(base.spec, tmp_path / "sparse")
    adapters = {kind: fold_folder(path, base) for kind, path in folders.items()}
    batch = MixedBatch(base).load_all(adapters)
    names: list[str | tuple[str, float] | None] = [None, *folders]
    found = batch.logits(IDS[: len(names)], names)
    for ids, name, logits in zip(IDS, names, found, strict=False):
        assert torch.equal(logits, batch.logits([ids], [name])[0]), name
    plain, nothing = batch.logits([IDS[0]] * 2, [None, ("delta", 0.0)])
    assert torch.equal(plain, nothing)
