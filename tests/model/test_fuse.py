"""Fused modules: only what was proven equal is fused, and a step with them gives what a step without them gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deltaserve.engine.batch import ScheduledSequence
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model import base as base_module
from deltaserve.model import fuse
from deltaserve.model.base import load_base
from deltaserve.model.kv_cache import KVCache
from deltaserve_kernels import cpu
from deltatest.tiny_models import build_tiny_model

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="modules are fused for the C++ operators alone")

# What of a layer is fused: norms with a plain or an offset weight, gated MLPs, attention with nothing but rotary.
FUSED = {
    "llama": {"norm", "gated", "attention"},
    "mistral": {"norm", "gated", "attention"},
    "qwen2": {"norm", "gated", "attention"},
    "qwen3": {"norm", "gated"},  # normalises q and k
    "gemma2": {"norm", "gated", "attention"},
    "phi3": {"norm"},  # linears that are fused in the checkpoint
    "gpt2": set(),
}
KINDS = {"FusedNorm": "norm", "FusedGated": "gated", "FusedAttention": "attention"}


def logits(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    base = load_base(folder, dtype=dtype)
    runner = ModelRunner(base, KVCache(base.kv_layout, 6, "cpu"))
    first = [ScheduledSequence(0, tuple(range(40, 70)), 0, (0, 1, 2)), ScheduledSequence(1, (7, 8, 9), 0, (3,))]
    second = [ScheduledSequence(0, (5,), 30, (0, 1, 2)), ScheduledSequence(1, (6,), 3, (3,))]
    return torch.cat([runner.execute(first), runner.execute(second)])


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_and_that_it_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_tiny_model(name, tmp_path)
    base = load_base(folder, dtype=torch.float32)
    forwards = (module.__dict__.get("forward") for module in base._model.modules())
    assert {KINDS[type(f).__name__] for f in forwards if type(f).__name__ in KINDS} == FUSED[name]
    fused = {dtype: logits(folder, dtype) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(base_module, "fuse", lambda _: None)
    plain = {dtype: logits(folder, dtype) for dtype in (torch.float32, torch.bfloat16)}
    exact = plain[torch.float32]
    assert (fused[torch.float32] - exact).norm() <= 1e-5 * exact.norm()
    # Two ways of rounding lie about as far from fp32; how far exactly is the processor's. A wrong formula is caught
    # above, and lies many times further here.
    assert (fused[torch.bfloat16] - exact).norm() <= 2 * (plain[torch.bfloat16] - exact).norm()


class OddNorm(nn.Module):
    """Looks like an RMS norm and is none: it subtracts the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32))
        self.eps = 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def test_a_lookalike_is_left_alone() -> None:
    model = nn.Sequential(OddNorm(), nn.RMSNorm(32, eps=1e-5))
    fuse.fuse(model)
    assert "forward" not in model[0].__dict__
    assert type(model[1].__dict__["forward"]).__name__ == "FusedNorm"
