"""Modules saved whole and trained biases beside every kind that PEFT has them for, against PEFT, in one batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.deltas.fold import fold
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.formats import read_adapter
from deltatest import rotation_kinds
from deltatest.mixed_batch import MixedBatch, distance, prompts
from deltatest.peft_adapters import peft_logits
from deltatest.peft_kinds import CASES, KindCase, near_the_base, write_case
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

BIASED = {
    "hra": "hra_only",
    "vera": "all",
    "pvera": "pvera_only",
    "miss": "MiSS_only",
    "gralora": "gralora_only",
    "delora": "all",
    "vblora": "vblora_only",
    "unilora": "unilora_only",
    "tinylora": "tinylora_only",
    "fourierft": "fourierft_only",
    "waveft": "waveft_only",
    "c3a": "c3a_only",
    "randlora": "randlora_only",
    "deft": "all",
    "oft": "oft_only",
    "boft": "all",
    "frod": "frod_only",
    "adalora": "lora_only",
}
"""Every kind that is read here and whose config has ``bias``, but for GLoRA."""
SAVED = ("loha", "hra", "hira", "supertuning", "glora", "road", "oft", "ia3")
"""One for each way of reading and each form of term."""
WHOLE = ["dense_4h_to_h", "embed_in", "lm_head", "final_layer_norm"]
BOTH = ("lora", "vera", "boft", "deft")
"""With both: beside modules saved whole, ``all`` writes biases again."""
HOLDERS = ["mlp", "attention.dense", "final_layer_norm", "embed_in"]
_OTHERS = {
    "lora": KindCase("LoraConfig", {"r": 3}, 0.3),
    "oft": rotation_kinds.CASES["oft"],
    "boft": rotation_kinds.CASES["boft"],
    "road": rotation_kinds.CASES["road-1"],
    "ia3": KindCase("IA3Config", {"feedforward_modules": []}, 0.5),
}
IDS = prompts(tuple(5 + i % 9 for i in range(len(BIASED) + len(SAVED) + len(BOTH) + 1)), VOCAB_SIZE)


@dataclass
class Setting:
    base: BaseModel
    model: Any
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """All linears and norms of GPT-NeoX have biases."""
    root = tmp_path_factory.mktemp("beside")
    folder = build_tiny_model("gpt-neox", root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders = {}
    wanted: list[tuple[str, dict[str, Any]]] = [(kind, {"bias": bias}) for kind, bias in BIASED.items()]
    wanted += [(kind, {"modules_to_save": WHOLE}) for kind in SAVED]
    wanted += [(kind, {"bias": "all", "modules_to_save": HOLDERS}) for kind in BOTH]
    for seed, (kind, options) in enumerate(wanted):
        name = f"{kind}-{'-'.join(options)}"
        case = near_the_base(CASES.get(kind) or _OTHERS[kind], model)
        # A block of the others' targets must not be what a kind divides by.
        targets = ("dense_h_to_4h",) if kind in ("miss", "gralora") else ("query_key_value", "attention.dense")
        with rotation_kinds.butterflies():
            folders[name] = write_case(model, root / name, case, targets=targets, seed=seed, **options)
    adapters = {}
    for name, path in folders.items():
        parsed = read_adapter(path, base.spec).on_base(lambda linear: base.linear(linear).rows(0, 1 << 40))
        adapters[name] = fold(parsed, base.spec, base.dtype, base)
    return Setting(base, model, folders, adapters)


def test_all_in_one_batch_equal_peft(setting: Setting) -> None:
    batch = MixedBatch(setting.base, len(setting.adapters)).load_all(setting.adapters)
    names = [None, *setting.adapters]
    found = batch.logits(IDS, names, chunk=6)
    for ids, name, logits in zip(IDS, names, found, strict=True):
        (alone,) = batch.logits([ids], [name], chunk=6)
        assert torch.equal(logits, alone), name
        if name is not None:
            (plain,) = batch.logits([ids], [None])
            with rotation_kinds.butterflies():
                wanted = peft_logits(setting.model, setting.folders[name], ids)
            assert distance(wanted, plain) > 1e-2, f"{name}: an adapter without effect proves nothing"
            assert distance(logits, wanted) < 1e-4, name


def test_strength_0_and_reload_are_exact(setting: Setting, tmp_path: Path) -> None:
    batch = MixedBatch(setting.base, len(setting.adapters)).load_all(setting.adapters)
    for name, adapter in setting.adapters.items():
        plain, nothing, before = batch.logits([IDS[0]] * 3, [None, (name, 0.0), name])
        assert torch.equal(plain, nothing), name
        adapter.save(tmp_path / name)
        batch.reload(name, tmp_path / name)
        assert torch.equal(batch.logits(IDS[:1], [name])[0], before), name
