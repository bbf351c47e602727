"""Trained rows of embedding and head, LoRA of both, whole modules: against PEFT, alone and in a batch of all kinds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.deltas.vectors import dense_biases, dense_norms
from deltaserve.deltas.vocabulary import row_changes
from deltaserve.engine.batch import ScheduledPart
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.formats import read_adapter
from deltatest.mixed_batch import MixedBatch, distance, prompts
from deltatest.peft_adapters import make_peft_lora, peft_logits
from deltatest.real_engine import fold_folder
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model
from deltatest.vocabulary_adapters import KINDS, TOKENS, make_vocabulary_adapter

torch.set_num_threads(1)

IDS = prompts((21, 9, 30, 1, 17, 12, 8, 14, 11, 6, 19, 5, 16, 10, 7, 13, 4, 18, 15), VOCAB_SIZE)
for _prompt in IDS:  # every prompt meets trained tokens
    _prompt[::3] = [TOKENS[i % len(TOKENS)] for i in range(len(_prompt[::3]))]


@dataclass
class Setting:
    base: BaseModel
    model: torch.nn.Module
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]


@pytest.fixture(scope="module", params=["qwen2", "gpt2", "gemma2"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """gpt2 and gemma2 have tied heads, qwen2 has not; gemma2 scales its embeddings and caps its logits."""
    root = tmp_path_factory.mktemp("vocabulary")
    folder = build_tiny_model(request.param, root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    is_conv = request.param == "gpt2"
    target, norm = ("c_attn", "ln_f") if is_conv else ("q_proj", "norm")
    folders = {
        kind: make_vocabulary_adapter(kind, model, root / kind, target=target, norm=norm, is_conv=is_conv, seed=seed)
        for seed, kind in enumerate(KINDS)
        # PEFT ties nothing to what is not called embed_tokens, and cannot run a tied head that is a target itself.
        if not (request.param == "gpt2" and kind.endswith("-tied"))
        and not (base.spec.tied_embeddings and kind == "tokens-both")
    }
    folders["lora"] = make_peft_lora(model, root / "lora", rank=5, targets=[target], fan_in_fan_out=is_conv, std=0.1)
    return Setting(base, model, folders, {kind: fold_folder(path, base) for kind, path in folders.items()})


def test_alone_equals_peft(setting: Setting) -> None:
    for kind in setting.adapters:
        batch = MixedBatch(setting.base, 24).load_all({kind: setting.adapters[kind]})
        (plain,) = batch.logits(IDS[:1], [None])
        (found,) = batch.logits(IDS[:1], [kind], chunk=8)
        wanted = peft_logits(setting.model, setting.folders[kind], IDS[0])
        assert distance(wanted, plain) > 1e-2, f"{kind}: an adapter without effect proves nothing"
        assert distance(found, wanted) < 1e-4, kind


def test_all_kinds_in_one_batch_equal_peft_and_change_nobody_else(setting: Setting) -> None:
    batch = MixedBatch(setting.base, 24).load_all(setting.adapters)
    names: list[str | tuple[str, float] | None] = [None, *setting.adapters]
    found = batch.logits(IDS[: len(names)], names, chunk=7)
    for ids, name, logits in zip(IDS, names, found, strict=False):
        if isinstance(name, str):
            assert distance(logits, peft_logits(setting.model, setting.folders[name], ids)) < 1e-4, name
        (alone,) = batch.logits([ids], [name], chunk=7)  # company is not felt, to the bit
        assert torch.equal(logits, alone), name
    bare = MixedBatch(setting.base, 24).load_all({"lora": setting.adapters["lora"]})
    assert torch.equal(found[0], bare.logits(IDS[:1], [None], chunk=7)[0])
    index = names.index("lora")
    assert torch.equal(found[index], bare.logits([IDS[index]], ["lora"], chunk=7)[0])


def test_strength(setting: Setting) -> None:
    batch = MixedBatch(setting.base, 24).load_all(setting.adapters)
    spec = setting.base.spec
    for kind in setting.adapters:
        plain, nothing, half = batch.logits([IDS[0]] * 3, [None, (kind, 0.0), (kind, 0.5)])
        assert torch.equal(plain, nothing), kind
        adapter = read_adapter(setting.folders[kind], spec)
        wanted = setting.base.folded_logits(
            torch.tensor(IDS[0]),
            {name: (lambda make=make: make() / 2) for name, make in dense_deltas(adapter, spec, setting.base).items()},
            {name: (lambda made=made: made() / 2) for name, made in dense_biases(adapter, setting.base).items()},
            norms={
                name: (w if w is None else w / 2, b if b is None else b / 2)
                for name, (w, b) in dense_norms(adapter, setting.base).items()
            },
            rows={
                name: (lambda ids, change=change: change(ids) / 2)
                for name, change in row_changes(adapter, spec, setting.base).items()
            },
        )
        assert distance(half, wanted) < 1e-4, kind
        assert distance(half, plain) > 5e-3, kind


def test_evicted_and_read_again_it_answers_to_the_bit(setting: Setting, tmp_path: Path) -> None:
    batch = MixedBatch(setting.base, 24).load_all(setting.adapters)
    used = batch.pool.used_bytes
    for kind, adapter in setting.adapters.items():
        adapter.save(tmp_path / kind)
        (before,) = batch.logits(IDS[:1], [kind])
        batch.reload(kind, tmp_path / kind)
        assert batch.pool.used_bytes == used
        assert torch.equal(batch.logits(IDS[:1], [kind])[0], before), kind


def test_tokens_that_were_not_trained_keep_their_bits(setting: Setting) -> None:
    batch = MixedBatch(setting.base, 24).load_all({"rows": setting.adapters["tokens-alone"]})
    ids = [token for token in range(3, VOCAB_SIZE) if token not in TOKENS][:24]
    plain, found = batch.logits([ids, ids], [None, "rows"])
    others = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    others[list(TOKENS)] = False
    assert torch.equal(plain[:, others], found[:, others])
    assert setting.base.spec.tied_embeddings == (not torch.equal(plain, found))


def test_several_adapters_with_rows_on_one_row(setting: Setting) -> None:
    batch = MixedBatch(setting.base, 24).load_all(setting.adapters)
    names, scales = ("tokens", "lora-both", "saved", "tokens-head"), (1.0, 0.5, 0.25, 1.0)
    parts = tuple(ScheduledPart(batch.slots[name], scale, scale) for name, scale in zip(names, scales, strict=True))
    found = batch.driver.logits([IDS[0]], [parts])[0]
    spec, base = setting.base.spec, setting.base
    adapters = [read_adapter(setting.folders[name], spec) for name in names]
    deltas: dict[str, Tensor] = {}
    for adapter, scale in zip(adapters, scales, strict=True):
        for module, make in dense_deltas(adapter, spec, base).items():
            deltas[module] = deltas.get(module, torch.zeros(())) + scale * make()
    changes = [row_changes(adapter, spec, base) for adapter in adapters]

    def total(name: str, ids: Tensor) -> Tensor:
        made = [scale * change[name](ids) for change, scale in zip(changes, scales, strict=True) if name in change]
        return torch.stack(made).sum(0)

    wanted = base.folded_logits(
        torch.tensor(IDS[0]),
        {name: (lambda name=name: deltas[name]) for name in deltas},
        rows={name: (lambda ids, name=name: total(name, ids)) for name in spec.vocabulary},
    )
    assert distance(found, wanted) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["gemma2", "qwen2"])
def test_narrow_dtypes(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A trained row is taken as it is, and company is not felt where sums are rounded."""
    folder = build_tiny_model(arch, tmp_path / "base")
    base = load_base(folder, dtype=dtype, cache_dir=tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    kinds = ("tokens", "lora-both", "saved")
    folders = {k: make_vocabulary_adapter(k, model, tmp_path / k, target="q_proj", norm="norm") for k in kinds}
    adapters = {kind: fold_folder(path, base) for kind, path in folders.items()}
    batch = MixedBatch(base).load_all(adapters)
    names: list[str | tuple[str, float] | None] = [None, *kinds]
    found = batch.logits(IDS[:4], names)
    for ids, name, logits in zip(IDS, names, found, strict=False):
        (alone,) = MixedBatch(base).load_all(adapters).logits([ids], [name])
        assert torch.equal(logits, alone), name
        plain, nothing = batch.logits([ids, ids], [None, (str(name), 0.0) if name else None])
        assert torch.equal(plain, nothing), name
