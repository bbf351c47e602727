"""Rotations end to end: upload, proof, answers equal to PEFT's beside others, eviction and reload, strengths."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.core import Binding, BindingPart, GenerationRequest, SamplingParams
from deltaserve.errors import AdapterRefused, InvalidRequest
from deltaserve.model.base import BaseModel
from deltaserve_store.formats.peft_kinds import reader as reader_module
from deltaserve_store.rotation_deltas import RotationDelta
from deltatest.admission_rig import Rig, run
from deltatest.peft_adapters import peft_greedy
from deltatest.rotation_kinds import compiler_of, make_givens, make_rotation
from deltatest.runtime_factory import SMALL, open_runtime

PROMPT = (5, 17, 60, 2, 9, 41, 88, 5)
CASES = ("oft", "oft-series", "road-4", "boft", "beft")


@pytest.fixture(scope="module")
def kinds(hf_model: Any, base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What PEFT writes, and ``givens`` of the project's own format."""
    root = tmp_path_factory.mktemp("rotations")
    written = {name: make_rotation(hf_model, root / name, name, seed=index) for index, name in enumerate(CASES)}
    return {**written, "givens": make_givens(base.spec, root / "givens")}


def greedy(hf_model: Any, kinds: dict[str, Path], name: str) -> list[int]:
    with compiler_of(name):
        return peft_greedy(hf_model, kinds[name], PROMPT, 8)


def test_every_kind_lives_through_upload_serving_eviction_and_reload(
    base: BaseModel, hf_model: Any, kinds: dict[str, Path], shelf: Path, tmp_path: Path
) -> None:
    """Two slots for all kinds: every wave of requests evicts what the wave before has loaded, and answers the same."""

    async def ask_all() -> list[list[int]]:
        jobs = [runtime.generate(name, PROMPT, 8) for name in ("tiny", "lora", *kinds)]
        return [answer.token_ids for answer in await asyncio.wait_for(asyncio.gather(*jobs), 120)]

    async def steps() -> None:
        nonlocal runtime
        async with open_runtime(base, tmp_path / "store", limits=replace(SMALL, adapter_slots=2)) as runtime:
            await runtime.admit(shelf / "lora-0", "lora")
            for name, folder in kinds.items():
                result = await runtime.admit(folder, name)
                assert result.evidence.max_error <= result.evidence.tolerance
                assert result.evidence.effect > 10 * result.evidence.tolerance, f"{name} has no effect to prove"
                assert result.record.kinds == (("vector",) if name == "beft" else ("rotation",))
            first = await ask_all()
            plain = [peft_greedy(hf_model, folder, PROMPT, 8) for folder in (None, shelf / "lora-0")]
            assert first[:-1] == plain + [greedy(hf_model, kinds, name) for name in CASES]
            assert await ask_all() == first
        async with open_runtime(base, tmp_path / "store") as runtime:
            assert await ask_all() == first

    runtime: Any = None
    run(steps())


def test_every_kind_is_proven_in_a_narrow_dtype(
    load: Callable[[torch.dtype], BaseModel], kinds: dict[str, Path], tmp_path: Path
) -> None:
    async def steps() -> None:
        async with open_runtime(load(torch.bfloat16), tmp_path / "store") as runtime:
            for name, folder in kinds.items():
                result = await runtime.admit(folder, name)
                assert result.evidence.max_error <= result.evidence.tolerance

    run(steps())


def test_a_faint_rotation_is_proven_at_a_larger_scale(rig: Rig, hf_model: Any, tmp_path: Path) -> None:
    """With a scale on the other side (BOFT) too, where the strength comes in twice."""
    for name in ("oft", "boft"):
        folder = make_rotation(hf_model, tmp_path / name, name, std=4e-7)
        evidence = run(rig.admit(folder, name)).evidence
        assert evidence.amplified is not None
        assert evidence.amplified.effect > 2 * evidence.amplified.tolerance > 0


def test_a_wrong_rotation_does_not_pass_the_door(
    rig: Rig, kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof's oracle is the method's own formula: a rotation the other way round is found, whatever the kind."""
    convert = reader_module.convert_one

    def backwards(*arguments: Any) -> Any:
        delta = convert(*arguments)
        if not isinstance(delta, RotationDelta):
            return delta
        turned = [blocks._replace(changes=blocks.changes.transpose(1, 2).contiguous()) for blocks in delta.factors]
        return replace(delta, factors=tuple(turned))

    monkeypatch.setattr(reader_module, "convert_one", backwards)
    for name in ("oft", "road-4", "boft"):
        with pytest.raises(AdapterRefused) as caught:
            run(rig.admit(kinds[name], name))
        assert [reason.code for reason in caught.value.reasons] == ["proof_failed"], name


def test_a_rotation_is_asked_for_whole_or_not_at_all(base: BaseModel, kinds: dict[str, Path], tmp_path: Path) -> None:
    async def answer(first: float, last: float, version: str) -> list[int]:
        request = GenerationRequest(
            request_id=f"{version}-{first}-{last}",
            prompt_ids=PROMPT,
            sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
            binding=Binding((BindingPart(version, first, last),)),
        )
        return [
            token async for output in runtime.engine.submit(request) for d in output.deltas for token in d.token_ids
        ]

    async def steps() -> None:
        nonlocal runtime
        async with open_runtime(base, tmp_path / "store") as runtime:
            oft = (await runtime.admit(kinds["oft"], "oft")).record.version
            beft = (await runtime.admit(kinds["beft"], "beft")).record.version
            plain = (await runtime.generate("tiny", PROMPT, 4)).token_ids
            assert await answer(0.0, 0.0, oft) == plain
            assert await answer(1.0, 1.0, oft) == (await runtime.generate("oft", PROMPT, 4)).token_ids
            assert len(await answer(0.5, 0.5, beft)) == 4
            for first, last in ((0.5, 0.5), (0.0, 1.0), (-1.0, -1.0), (2.0, 2.0)):
                with pytest.raises(InvalidRequest, match="allowed: strength 0 or 1") as caught:
                    await answer(first, last, oft)
                assert caught.value.error_code == "composition_refused"

    runtime: Any = None
    run(steps())
