"""Adapters of virtual tokens through the door: proven, served beside others, evicted, reloaded; refused where they are
wrong or too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.admission import proof
from deltaserve.core import Binding, BindingPart, GenerationRequest, SamplingParams
from deltaserve.deltas import fold as fold_module
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.errors import AdapterRefused, ContextLengthExceeded, InvalidRequest
from deltaserve.model.base import BaseModel
from deltatest.admission_rig import Rig, run
from deltatest.peft_adapters import make_peft_lora, peft_greedy
from deltatest.prefix_adapters import CASES, Oracle, make_prefix, num_tokens
from deltatest.runtime_factory import SMALL, open_runtime

PROMPT = (5, 17, 60, 2, 9, 41, 88, 5)


@pytest.fixture(scope="module")
def prefixes(hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prefixes")
    return {name: make_prefix(hf_model, root / name, name, seed=index) for index, name in enumerate(CASES)}


def test_every_kind_lives_through_upload_serving_eviction_and_reload(
    base: BaseModel, hf_model: Any, prefixes: dict[str, Path], tmp_path: Path
) -> None:
    """Two slots for all kinds and a LoRA: every wave evicts what the wave before has loaded, and answers the same."""
    folders = {**prefixes, "lora": make_peft_lora(hf_model, tmp_path / "lora")}

    async def ask_all(runtime: Any) -> list[list[int]]:
        jobs = [runtime.generate(name, PROMPT, 10) for name in ("tiny", *folders)]
        return [answer.token_ids for answer in await asyncio.wait_for(asyncio.gather(*jobs), 120)]

    async def steps() -> None:
        versions = {}
        async with open_runtime(base, tmp_path / "store", limits=replace(SMALL, adapter_slots=2)) as runtime:
            for name, folder in folders.items():
                result = await runtime.admit(folder, name)
                assert result.evidence.max_error <= result.evidence.tolerance
                assert result.evidence.effect > 10 * result.evidence.tolerance, f"{name} has no effect to prove"
                versions[name] = result.record.version
                if name in CASES:
                    assert (result.record.kinds, result.record.num_prefix_tokens) == (("prefix",), num_tokens(name))
            first = await ask_all(runtime)
            oracles = [Oracle(hf_model, folder).generate(PROMPT, 10) for folder in prefixes.values()]
            others = [peft_greedy(hf_model, folder, PROMPT, 10) for folder in (None, folders["lora"])]
            assert first == [others[0], *oracles, others[1]]
            assert await ask_all(runtime) == first
            held = {status.version: status for status in runtime.engine.status().adapters}
            page = base.kv_layout.block_bytes
            for name in CASES:
                status = held[versions[name]]
                kept = 0 if name.startswith(("prefix", "cartridge")) else num_tokens(name) * base.hidden_size * 4
                assert status.host_bytes + status.device_bytes == -(-num_tokens(name) // 16) * page + kept
        async with open_runtime(base, tmp_path / "store") as runtime:
            assert await ask_all(runtime) == first
            again = await runtime.admit(folders["prompt"], "prompt")
            assert (again.created, again.record.version) == (False, versions["prompt"])

    run(steps())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_is_proven_in_narrow_dtypes(
    load: Callable[[torch.dtype], BaseModel], prefixes: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    async def steps() -> None:
        async with open_runtime(load(dtype), tmp_path / "store") as runtime:
            for name, folder in prefixes.items():
                result = await runtime.admit(folder, name)
                assert result.evidence.max_error <= result.evidence.tolerance < result.evidence.effect

    run(steps())


def test_reloading_is_bit_for_bit(rig: Rig, prefixes: dict[str, Path]) -> None:
    for name in ("prefix-projected", "p-tuning-lstm"):
        version = run(rig.admit(prefixes[name], name)).record.version
        path = rig.proven.locate(version)
        assert path is not None
        loaded = FoldedAdapter.load(path, rig.base.spec, torch.float32)
        fresh = fold_module.fold(rig.admission._read(prefixes[name]), rig.base.spec, torch.float32, rig.base)
        assert loaded.prefix is not None
        assert fresh.prefix is not None
        assert torch.equal(loaded.prefix.pages, fresh.prefix.pages)


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "keys and values changed places": lambda pages: pages.flip(3),
    "layers changed places": lambda pages: pages.flip(2),
    "heads changed places": lambda pages: pages.flip(4),
    "one position late": lambda pages: pages.roll(1, dims=5),
    "one block lost": lambda pages: torch.cat((pages[:, :1], 0 * pages[:, 1:]), dim=1),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_conversion_does_not_pass_the_door(
    rig: Rig, prefixes: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    fold_prefix = fold_module.fold_prefix

    def spoiled(*arguments: Any) -> Any:
        term = fold_prefix(*arguments)
        return replace(term, pages=WRONG[mistake](term.pages).contiguous())

    monkeypatch.setattr(fold_module, "fold_prefix", spoiled)
    for name in ("cartridge", "prompt"):
        with pytest.raises(AdapterRefused) as caught:
            run(rig.admit(prefixes[name], name))
        assert [reason.code for reason in caught.value.reasons] == ["proof_failed"], name
    assert rig.is_clean()


def test_a_proof_has_one_strength(rig: Rig, hf_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An effect that does not stand out: others are amplified, a prefix is not."""
    folder = make_prefix(hf_model, tmp_path / "prefix", "prefix")
    monkeypatch.setattr(proof, "CLEAR_EFFECT", 1e9)
    result = run(rig.admit(folder))
    assert result.evidence.amplified is None
    assert rig.engine.num_probes == 1


def test_no_room_for_a_prompt_is_refused(rig: Rig, hf_model: Any, tmp_path: Path) -> None:
    """The context of this engine is 128 tokens."""
    for name, count in (("cartridge", 127), ("prompt", 200)):
        folder = make_prefix(hf_model, tmp_path / name, name, num_virtual_tokens=count)
        with pytest.raises(AdapterRefused) as caught:
            run(rig.admit(folder, name))
        (reason,) = caught.value.reasons
        assert (reason.code, reason.where) == ("prefix_too_long", "prefix")
        assert "at most 126" in reason.allowed
    longest = make_prefix(hf_model, tmp_path / "longest", "cartridge", num_virtual_tokens=126)
    assert run(rig.admit(longest, "longest")).evidence.num_tokens == 1
    assert rig.is_clean()


def test_requests_are_refused_at_the_door_and_by_the_engine(
    base: BaseModel, prefixes: dict[str, Path], tmp_path: Path
) -> None:
    """256 tokens of context, 37 of them taken."""

    async def steps() -> None:
        async with open_runtime(base, tmp_path / "store") as runtime:
            record = (await runtime.admit(prefixes["cartridge"], "c")).record

            def make(max_tokens: int, scale: float = 1.0, told: int = record.num_prefix_tokens) -> GenerationRequest:
                runtime.num_requests += 1
                part = BindingPart(record.version, scale, scale, num_prefix_tokens=told)
                sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
                return GenerationRequest(f"r{runtime.num_requests}", PROMPT, sampling, Binding((part,)))

            with pytest.raises(ContextLengthExceeded, match="virtual tokens take 37"):
                runtime.engine.submit(make(256 - 37 - len(PROMPT) + 1))
            with pytest.raises(InvalidRequest, match="allowed: strength 0 or 1"):
                runtime.engine.submit(make(4, scale=0.5))
            for late, error in ((make(250, told=0), ContextLengthExceeded), (make(4, 0.5, 0), InvalidRequest)):
                with pytest.raises(error):
                    async for _ in runtime.engine.submit(late):
                        pass
            outputs = [output async for output in runtime.engine.submit(make(256 - 37 - len(PROMPT)))]
            assert sum(len(delta.token_ids) for output in outputs for delta in output.deltas) == 211
            assert outputs[-1].num_prompt_tokens == len(PROMPT)

    run(steps())
