"""Adapters larger than the weights they change amplify rounding in both halves of a proof: that is measured, and it
lets nothing else through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.admission import proof
from deltaserve.admission.evidence import Comparison, Evidence, ProofKey
from deltaserve.admission.noise import NOISE_SHARE, with_noise
from deltaserve.admission.proof import FLOAT32_TOLERANCE, Prover, judge
from deltaserve.deltas.fold import fold
from deltaserve.model.base import BaseModel, load_base
from deltaserve.tinybase import CHECKPOINT
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import LoraDelta, ParsedAdapter
from deltatest.peft_adapters import make_peft_lora
from deltatest.probe_engine import SerialEngine

torch.set_num_threads(1)
VERSION = "ab" * 32
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=[(torch.float32, 0.3), (torch.float16, 0.13)], ids=["float32", "float16"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, ParsedAdapter]:
    """The embedded base and a LoRA whose deltas are many times its weights (float32) or a few times (float16)."""
    dtype, std = request.param
    path = tmp_path_factory.mktemp("large")
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    base = load_base(CHECKPOINT, dtype=dtype, cache_dir=path / "digests")
    return base, read_adapter(make_peft_lora(model, path / "lora", std=std), base.spec)


def measure(base: BaseModel, adapter: ParsedAdapter, served: ParsedAdapter, path: Path) -> Evidence:
    async def in_worker(function: Callable[[], Any]) -> Any:
        return function()

    fold(served, base.spec, base.dtype, base).save(path / "folded")
    engine = SerialEngine(base)
    engine.register_candidate(VERSION, path / "folded")
    key = ProofKey(base.spec.fingerprint, str(base.dtype), "cpu", "test", 1)
    return asyncio.run(Prover(base, engine, key, in_worker).measure(VERSION, adapter))


def scaled(adapter: ParsedAdapter, factor: float) -> ParsedAdapter:
    deltas = [
        replace(delta, scaling=delta.scaling * factor)
        if isinstance(delta, LoraDelta) and delta.module == FIRST
        else delta
        for delta in adapter.deltas
    ]
    return replace(adapter, deltas=tuple(deltas))


def test_rounding_that_the_adapter_amplifies_is_no_fault(
    large: tuple[BaseModel, ParsedAdapter], tmp_path: Path
) -> None:
    base, adapter = large
    evidence = measure(base, adapter, adapter, tmp_path)
    usual = max(
        FLOAT32_TOLERANCE * max(1.0, evidence.plain.logits_rms), proof.NARROW_FACTOR * (evidence.base_error or 0)
    )
    assert evidence.max_error > usual, "the case does not show what it is made for"
    judgement = judge(evidence, accept_no_effect=False)
    assert judgement.reasons == ()
    assert any("amplifies the rounding" in warning for warning in judgement.warnings)
    assert evidence.tolerance <= NOISE_SHARE * evidence.effect
    assert Evidence.from_dict(evidence.to_dict()) == evidence


def test_a_fault_of_one_linear_is_refused_beside_that_rounding(
    large: tuple[BaseModel, ParsedAdapter], tmp_path: Path
) -> None:
    base, adapter = large
    factor = 1.01 if base.dtype == torch.float32 else 1.5
    evidence = measure(base, adapter, scaled(adapter, factor), tmp_path)
    (reason,) = judge(evidence, accept_no_effect=False).reasons
    assert reason.code == "proof_failed"
    assert "rounding alone makes" in reason.allowed
    assert evidence.max_error > 2 * evidence.tolerance


def test_rounding_that_hides_the_effect_proves_nothing() -> None:
    comparison = Comparison(1.0, effect=2.0, max_error=0.5, tolerance=0.01, logits_rms=1.0, greedy_agreement=1.0)
    assert with_noise(comparison, 0.4).tolerance == NOISE_SHARE * 2.0
    assert not with_noise(comparison, 0.4).is_within_tolerance
    assert with_noise(comparison, 0.0).tolerance == 0.01, "never below the usual"
