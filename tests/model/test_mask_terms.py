"""Masks over the base's weights: which form folding gives them, their sum with other parts, and rounded sums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deltaserve.deltas.dense import DenseTerm
from deltaserve.deltas.fold import fold
from deltaserve.deltas.folded import FoldedAdapter, FoldedFileInvalid, SparseTerm
from deltaserve.deltas.folded_file import read_tensors, write_tensors
from deltaserve.engine.batch import ScheduledPart
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.weight import BaseWeight, PanelPacked
from deltaserve_kernels import DenseEntry, pack_bits, use_backend
from deltaserve_store.dense_deltas import MaskDelta
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.deltaserve_dense import write_dense_adapter
from deltatest.apart_adapters import make_dense
from deltatest.mixed_batch import MixedBatch, distance, prompts
from deltatest.peft_adapters import base_logits, make_sparse
from deltatest.real_engine import fold_folder
from deltatest.sum_of_deltas import Parts, summed
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

IDS = prompts((19, 9, 14), VOCAB_SIZE)


@dataclass
class Setting:
    base: BaseModel
    model: nn.Module
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("masks")
    folder = build_tiny_model("llama", root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders = {
        "mask": make_dense(base.spec, root / "mask", "thick-mask", seed=1),
        "other": make_dense(base.spec, root / "other", "thick-mask", seed=2),
        "delta": make_dense(base.spec, root / "delta", "delta", seed=3),
        "signs": make_dense(base.spec, root / "signs", "signs", seed=4),
        "sparse": make_sparse(base.spec, root / "sparse", targets=[n.rsplit(".", 1)[-1] for n in base.linears]),
    }
    return Setting(base, model, folders, {name: fold_folder(path, base) for name, path in folders.items()})


@pytest.mark.parametrize("beyond", [0, 1])
def test_lists_up_to_a_sixteenth_of_a_linear_bits_above_and_both_are_right(
    setting: Setting, beyond: int, tmp_path: Path
) -> None:
    base, name = setting.base, next(iter(setting.base.linears))
    linear = base.spec.linears[name]
    count = linear.out_features * linear.in_features // 16 + beyond
    marked = torch.zeros(linear.out_features * linear.in_features, dtype=torch.bool)
    marked[torch.randperm(len(marked), generator=torch.Generator().manual_seed(0))[:count]] = True
    marked = marked.view(linear.out_features, linear.in_features)
    write_dense_adapter(tmp_path, [MaskDelta(name, pack_bits(marked))], base.spec.fingerprint)
    folded = fold(read_adapter(tmp_path, base.spec), base.spec, base.dtype, base)
    ((term,),) = folded.terms.values()
    assert isinstance(term, DenseTerm if beyond else SparseTerm)
    assert folded.kinds == (("dense",) if beyond else ("sparse",))
    model: Any = AutoModelForCausalLM.from_pretrained(base_folder(setting), attn_implementation="eager").eval()
    with torch.no_grad():
        model.get_submodule(name).weight[marked] = 0.0
    batch = MixedBatch(base).load_all({"mask": folded})
    found, plain = batch.logits(IDS[:1] * 2, ["mask", None])
    assert distance(found, base_logits(model, IDS[0])) < 1e-4
    assert distance(found, plain) > 1e-3


def base_folder(setting: Setting) -> Path:
    return next(iter(setting.folders.values())).parent / "base"


@pytest.mark.parametrize(
    "parts",
    [
        (("mask", 0.7), ("other", -0.4)),
        (("delta", 0.5), ("mask", (1.0, 0.25)), ("signs", 0.5)),
        (("mask", 1.0), ("sparse", 2.0)),
    ],
    ids=["two masks", "beside a matrix and signs, a profile of depths", "beside entries"],
)
def test_sums_take_out_of_the_base_alone(setting: Setting, parts: Parts) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    found = composed(batch, parts)
    wanted = base_logits(summed(setting.model, setting.base, setting.folders, parts), IDS[0])
    assert distance(found, wanted) < 2e-4
    assert distance(found, composed(batch, parts[:1])) > 1e-2


def composed(batch: MixedBatch, parts: Parts) -> Tensor:
    def ends(strength: float | tuple[float, float]) -> tuple[float, float]:
        return strength if isinstance(strength, tuple) else (strength, strength)

    given = tuple(ScheduledPart(batch.slots[name], *ends(strength)) for name, strength in parts)
    return batch.driver.logits(IDS[:1], [given])[0].clone()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_panels_of_16_bits_give_what_the_definition_gives(dtype: torch.dtype, tmp_path: Path) -> None:
    base = load_base(build_tiny_model("llama", tmp_path / "base"), dtype=dtype, cache_dir=tmp_path / "cache")
    folded = fold_folder(make_dense(base.spec, tmp_path / "mask", "thick-mask"), base)
    batch = MixedBatch(base).load_all({"mask": folded})
    plain, found, nothing, half = batch.logits([IDS[0]] * 4, [None, "mask", ("mask", 0.0), ("mask", 0.5)])
    assert torch.equal(plain, nothing)
    before = use_backend("reference")
    try:
        wanted, halved = batch.logits([IDS[0]] * 2, ["mask", ("mask", 0.5)])
    finally:
        use_backend(before)
    rounding = float(plain.float().abs().max()) * (2**-5 if dtype is torch.bfloat16 else 2**-8)
    assert distance(found.float(), wanted.float()) < rounding
    assert distance(half.float(), halved.float()) < rounding
    assert distance(found.float(), plain.float()) > 2 * rounding
    for row, name in ((found, "mask"), (half, ("mask", 0.5))):
        assert torch.equal(batch.logits([IDS[0]], [name])[0], row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_masks_read_is_the_weight_itself(dtype: torch.dtype) -> None:
    matrix = torch.randn(40, 24).to(dtype)
    weight = BaseWeight(matrix)
    view = weight.view()
    assert view.outputs == 40
    for i, j in ((0, 40), (3, 17), (16, 32), (39, 40)):
        assert torch.equal(view.rows(i, j), matrix[i:j].float())
    if isinstance(weight._packed, PanelPacked):
        assert view.data.data_ptr() == weight._packed.panels.data_ptr()  # no copy


def test_damaged_masks_of_folded_files_are_refused(setting: Setting, tmp_path: Path) -> None:
    adapter, spec = setting.adapters["mask"], setting.base.spec
    adapter.save(tmp_path / "whole")
    again = FoldedAdapter.load(tmp_path / "whole", spec, setting.base.dtype)
    for name, (term,) in adapter.terms.items():
        (found,) = again.terms[name]
        assert isinstance(term, DenseTerm)
        assert isinstance(found, DenseTerm)
        assert term.mask is not None
        assert found.mask is not None
        assert torch.equal(found.mask, term.mask)
    name, (first,) = next(iter(adapter.terms.items()))
    assert isinstance(first, DenseTerm)
    assert first.mask is not None
    wrong = {
        "words": {"mask": first.mask[:, :-1].contiguous()},
        "dtype": {"mask": first.mask.float()},
        "forms": {"mask": first.mask, "delta": torch.zeros(first.mask.shape[0], first.in_features)},
    }
    for case, roles in wrong.items():
        path = tmp_path / case
        spoiled = FoldedAdapter({name: (first,)}, spec.fingerprint, adapter.dtype)
        spoiled.save(path)
        tensors = {f"{name}:{role}": tensor for role, tensor in roles.items()}
        write_tensors(path, tensors, _metadata(path))
        with pytest.raises(FoldedFileInvalid):
            FoldedAdapter.load(path, spec, adapter.dtype)


def _metadata(path: Path) -> dict[str, str]:
    return dict(read_tensors(path)[1])


def test_a_mask_without_the_base_says_what_it_needs() -> None:
    term = DenseTerm(8, mask=pack_bits(torch.ones(2, 8) > 0))
    assert term.nbytes == 8
    with pytest.raises(ValueError, match="give the base's weight"):
        term.matrix()
    entry = DenseEntry(8, mask=term.mask)
    assert torch.equal(entry.rows(0, 2, lambda i, j: torch.ones(j - i, 8)), -torch.ones(2, 8))
