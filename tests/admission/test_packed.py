"""Factors of few bits through the door: proven in every dtype, refused when their numbers are read wrong, and answered,
evicted and loaded again beside the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.errors import AdapterRefused
from deltaserve.model.base import BaseModel
from deltaserve_store.packed_factors import PackedFactors
from deltatest.admission_rig import Rig, run
from deltatest.parity.kinds.packed import ENTRIES
from deltatest.parity.registry import Bench
from deltatest.peft_adapters import base_logits
from deltatest.runtime_factory import SMALL, open_runtime

PROMPT = (5, 17, 60, 2, 9, 41, 88, 5)


@pytest.fixture(scope="module")
def folders(base: BaseModel, hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    return {entry.name: entry.write(Bench(hf_model, base.spec), root / entry.name) for entry in ENTRIES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_proven_and_outlive_an_eviction(
    load: Callable[[torch.dtype], BaseModel],
    hf_model: Any,
    folders: dict[str, Path],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    """One slot: the two push each other out."""

    async def steps() -> None:
        limits = replace(SMALL, adapter_slots=1)
        async with open_runtime(load(dtype), tmp_path / "store", limits=limits) as runtime:
            for name, folder in folders.items():
                evidence = (await runtime.admit(folder, name)).evidence
                assert evidence.max_error <= evidence.tolerance < 0.5 * evidence.effect
            answers = []
            for _ in range(2):
                jobs = [runtime.generate(name, PROMPT, 8) for name in ("tiny", *folders)]
                answers.append([found.token_ids for found in await asyncio.gather(*jobs)])
            assert answers[0] == answers[1]
            if dtype == torch.float32:
                for entry, tokens in zip(ENTRIES, answers[0][1:], strict=True):
                    ids = list(PROMPT)
                    for token in tokens:
                        assert int(entry.oracle(hf_model, folders[entry.name], ids)[-1].argmax()) == token
                        ids.append(token)
                assert int(base_logits(hf_model, PROMPT)[-1].argmax()) == answers[0][0][0]

    run(steps())


def test_a_wrong_reading_of_bits_does_not_pass_the_door(
    rig: Rig, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values on whole steps in place of half ones: an easy mistake, and small in all but the fewest bits."""
    right = PackedFactors.factors

    def shifted(packed: PackedFactors) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = right(packed)
        return a + 0.5 * float(packed.scales.float().mean()), b

    monkeypatch.setattr(PackedFactors, "factors", shifted)
    for name, folder in folders.items():
        with pytest.raises(AdapterRefused) as caught:
            run(rig.admit(folder, name))
        assert [reason.code for reason in caught.value.reasons] == ["proof_failed"], name
