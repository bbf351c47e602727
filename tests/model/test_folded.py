"""Folded mode: fp32 over a low-precision base, beside a running engine thread, bounded and strict about names."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.engine.batch import ScheduledSequence
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model import linear
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.kv_cache import KVCache
from deltatest.tiny_models import ARCHITECTURES, build_tiny_model

torch.set_num_threads(1)

IDS = torch.tensor([5, 9, 88, 140, 3, 3, 77, 20, 19, 6, 7, 8, 120, 33, 60])


def load(folder: Path, dtype: torch.dtype) -> BaseModel:
    return load_base(folder, dtype=dtype, cache_dir=folder / "cache")


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_low_precision_weights_are_widened_not_rounded_again(name: str, tmp_path: Path) -> None:
    """The oracle is transformers over the same bfloat16 weights, all turned to fp32."""
    folder = build_tiny_model(name, tmp_path)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").float()
    with torch.no_grad():
        wanted = oracle(IDS[None], use_cache=False).logits[0]
    base = load(folder, torch.bfloat16)
    assert base.dtype == torch.bfloat16
    assert (base.folded_logits(IDS, {}) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_paged_low_precision_stays_near_folded(dtype: torch.dtype, tmp_path: Path) -> None:
    base = load(build_tiny_model("llama", tmp_path), dtype)
    runner = ModelRunner(base, KVCache(base.kv_layout, 2, "cpu"))
    found = runner.execute([ScheduledSequence(0, IDS.tolist(), 0, (0,), logits="all")])
    wanted = base.folded_logits(IDS, {})
    distance = float((found - wanted).norm() / wanted.norm())
    assert 1e-5 < distance < 0.1


def test_weights_are_widened_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(build_tiny_model("qwen2", tmp_path), torch.float32)
    deltas = {base.linears[0]: lambda: torch.full((64, 64), 0.1), base.linears[-1]: lambda: torch.full((64, 96), 0.1)}
    whole = base.folded_logits(IDS, deltas)
    monkeypatch.setattr(linear, "MAX_FOLDED_ELEMENTS", 500)
    assert torch.allclose(base.folded_logits(IDS, deltas), whole, atol=1e-4)


def test_a_proof_runs_beside_the_engine_thread(tmp_path: Path) -> None:
    base = load(build_tiny_model("gpt2", tmp_path), torch.bfloat16)
    runner = ModelRunner(base, KVCache(base.kv_layout, 2, "cpu"))
    batch = [ScheduledSequence(0, IDS.tolist(), 0, (1,), logits="all")]
    stepped, folded = runner.execute(batch), base.folded_logits(IDS, {})
    wrong: list[int] = []

    def prove() -> None:
        wrong.extend(i for i in range(30) if not torch.equal(base.folded_logits(IDS, {}), folded))

    thread = threading.Thread(target=prove)
    thread.start()
    while thread.is_alive():
        assert torch.equal(runner.execute(batch), stepped)
    thread.join()
    assert not wrong


def test_what_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    base = load(build_tiny_model("llama", tmp_path), torch.float32)
    with pytest.raises(ValueError, match="no linear 'model"):
        base.folded_logits(IDS, {"model.embed_tokens": lambda: torch.zeros(199, 64)})
    with pytest.raises(ValueError, match=r"delta of model.layers.0.self_attn.q_proj is \[64, 1\]"):
        base.folded_logits(IDS, {base.linears[0]: lambda: torch.zeros(64, 1)})
    with pytest.raises(ValueError, match="65 ids"):
        base.folded_logits(torch.zeros(65, dtype=torch.long), {})
    # A failed pass leaves nothing behind.
    assert torch.isfinite(base.folded_logits(IDS, {})).all()
