"""The door in front of the real engine: proofs by real probes, answers equal to PEFT's, names that move under load."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.core import AdapterState, Binding, BindingPart
from deltaserve.errors import AdapterRefused, AdapterUnavailable, Conflict
from deltaserve.model.base import BaseModel
from deltaserve_store.errors import NotFound
from deltatest.admission_rig import run
from deltatest.peft_adapters import make_peft_lora, peft_greedy
from deltatest.runtime_factory import TinyRuntime, open_runtime

PROMPT = (5, 17, 60, 2, 9, 41, 88, 5)


def state_of(runtime: TinyRuntime, version: str) -> AdapterState:
    return next(status.state for status in runtime.engine.status().adapters if status.version == version)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_admitted_adapters_answer_like_peft(base: BaseModel, hf_model: Any, shelf: Path, tmp_path: Path) -> None:
    async def steps() -> None:
        async with open_runtime(base, tmp_path / "store", check_each_step=True) as runtime:
            for kind in ("lora-0", "lora-3", "shira"):
                result = await runtime.admit(shelf / kind, kind)
                assert result.evidence.max_error <= 1e-4
            jobs = [runtime.generate(model, PROMPT, 24) for model in ("tiny", "lora-0", "lora-3", "shira")]
            answers = [answer.token_ids for answer in await asyncio.gather(*jobs)]
            folders = (None, shelf / "lora-0", shelf / "lora-3", shelf / "shira")
            assert answers == [peft_greedy(hf_model, folder, PROMPT, 24) for folder in folders]
            assert len({tuple(answer) for answer in answers}) == 4

    run(steps())


def test_every_dtype_is_proven_on_the_real_engine(
    load: Callable[[torch.dtype], BaseModel], shelf: Path, tmp_path: Path
) -> None:
    async def steps() -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            async with open_runtime(load(dtype), tmp_path / "store") as runtime:
                for kind in ("lora-1", "sparse"):
                    result = await runtime.admit(shelf / kind, kind)
                    assert result.created == (dtype == torch.float32)
                    assert result.evidence.dtype == str(dtype).removeprefix("torch.")

    run(steps())


def test_a_restart_with_another_dtype_prepares_on_first_use(
    load: Callable[[torch.dtype], BaseModel], base: BaseModel, shelf: Path, tmp_path: Path
) -> None:
    """Several versions at once, more than the loader takes at a time: each is folded and proven before it answers."""

    async def steps() -> None:
        names = ("lora-0", "lora-1", "lora-2", "lora-3", "sparse")
        async with open_runtime(base, tmp_path / "store") as runtime:
            for kind in names:
                await runtime.admit(shelf / kind, kind)
        async with open_runtime(load(torch.bfloat16), tmp_path / "store") as runtime:
            jobs = [runtime.generate(name, PROMPT, 4) for name in names]
            answers = await asyncio.wait_for(asyncio.gather(*jobs), 60)
            for answer in answers:
                assert answer.version is not None
                evidence = runtime.proven.evidence(answer.version)
                assert evidence is not None
                assert evidence.dtype == "bfloat16"

    run(steps())


def test_a_damaged_folded_file_is_made_again(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    async def steps() -> None:
        async with open_runtime(base, tmp_path / "store") as runtime:
            version = (await runtime.admit(shelf / "lora-0", "a")).record.version
            good = (await runtime.generate("a", PROMPT)).token_ids
        path = next((tmp_path / "store" / "derived" / version).rglob("*.safetensors"))
        damaged = bytearray(path.read_bytes())
        damaged[-40] ^= 0xFF
        path.write_bytes(damaged)
        async with open_runtime(base, tmp_path / "store") as runtime:
            assert (await runtime.generate("a", PROMPT)).token_ids == good

    run(steps())


def test_damaged_stored_bytes_are_never_served(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    """Same shapes, other values, and no folded file left: the digest tells."""

    async def steps() -> None:
        async with open_runtime(base, tmp_path / "store") as runtime:
            version = (await runtime.admit(shelf / "lora-0", "a")).record.version
            await runtime.admit(shelf / "lora-1", "b")
        for path in (tmp_path / "store" / "derived" / version).rglob("*.safetensors"):
            path.unlink()
        stored = tmp_path / "store" / "versions" / version / "adapter_model.safetensors"
        damaged = bytearray(stored.read_bytes())
        damaged[-2] ^= 0x40
        stored.chmod(0o600)
        stored.write_bytes(damaged)
        async with open_runtime(base, tmp_path / "store") as runtime:
            with pytest.raises(AdapterUnavailable, match="damaged"):
                await runtime.generate("a", PROMPT)
            assert (await runtime.generate("b", PROMPT)).token_ids

    run(steps())


def test_adapters_of_another_base_are_listed_as_incompatible(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    async def steps() -> None:
        async with open_runtime(base, tmp_path / "store") as runtime:
            version = (await runtime.admit(shelf / "sparse", "a")).record.version
        spec = base.spec
        base.spec = replace(spec, fingerprint="d" * 64)
        try:
            async with open_runtime(base, tmp_path / "store") as runtime:
                with pytest.raises(AdapterUnavailable, match="another base"):
                    await runtime.generate("a", PROMPT)
                assert state_of(runtime, version) is AdapterState.INCOMPATIBLE
        finally:
            base.spec = spec
        async with open_runtime(base, tmp_path / "store") as runtime:
            assert (await runtime.generate("a", PROMPT)).version == version

    run(steps())


def test_a_refused_adapter_leaves_nothing_in_the_engine(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    async def steps() -> None:
        async with open_runtime(base, tmp_path / "store") as runtime:
            with pytest.raises(AdapterRefused):
                await runtime.admit(shelf / "zero", "zero")
            with pytest.raises(NotFound):
                runtime.engine.resolve("default", "zero")
            assert runtime.engine.status().adapters == ()
            with pytest.raises(AdapterUnavailable):
                await runtime.engine.probe(PROMPT, Binding((BindingPart("f" * 64),)))

    run(steps())


def test_concurrent_uploads_of_one_name(base: BaseModel, hf_model: Any, tmp_path: Path) -> None:
    """One wins each round, the others hear that they lost; the name ends at the winner's version."""

    async def steps() -> None:
        folders = [make_peft_lora(hf_model, tmp_path / f"u{i}", rank=2, seed=100 + i) for i in range(8)]
        async with open_runtime(base, tmp_path / "store") as runtime:
            jobs = [runtime.admit(folder, "a", expected_version="none") for folder in folders]
            outcomes = await asyncio.gather(*jobs, return_exceptions=True)
            winners = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
            assert len(winners) == 1
            assert all(isinstance(outcome, Conflict) for outcome in outcomes if outcome is not winners[0])
            version = winners[0].record.version
            assert runtime.engine.resolve("default", "a").version == version
            assert [record.version for record in runtime.store.versions("default", "a")] == [version]

            jobs = [runtime.admit(folder, "a") for folder in folders]
            results = await asyncio.gather(*jobs)
            assert runtime.engine.resolve("default", "a").version == results[-1].record.version
            assert len(runtime.store.versions("default", "a")) == len(folders)

    run(steps())


def test_delete_while_in_use(base: BaseModel, hf_model: Any, shelf: Path, tmp_path: Path) -> None:
    """Requests that run finish on the deleted version; new ones hear 404; its memory is freed after the last."""

    async def steps() -> None:
        async with open_runtime(base, tmp_path / "store", check_each_step=True) as runtime:
            version = (await runtime.admit(shelf / "lora-0", "a")).record.version
            expected = peft_greedy(hf_model, shelf / "lora-0", PROMPT, 220)
            jobs = [asyncio.ensure_future(runtime.generate("a", PROMPT, 220)) for _ in range(12)]
            while not any(s.num_pins for s in runtime.engine.status().adapters):
                await asyncio.sleep(0.001)
            await runtime.admission.delete("default", "a")
            with pytest.raises(NotFound):
                await runtime.generate("a", PROMPT)
            assert not all(job.done() for job in jobs)
            for answer in await asyncio.gather(*jobs):
                assert answer.token_ids == expected
            await runtime.generate("tiny", PROMPT, 2)
            status = [s for s in runtime.engine.status().adapters if s.version == version]
            assert all((s.device_bytes, s.num_pins) == (0, 0) for s in status)
            runtime.store.gc()
            with pytest.raises(NotFound):
                runtime.store.get("default", "a")

    run(steps())


@pytest.mark.timeout(120)
def test_a_thousand_alias_switches_under_load(base: BaseModel, hf_model: Any, shelf: Path, tmp_path: Path) -> None:
    """Every answer matches exactly one version from first token to last, and that version was the alias's target at
    the moment the request was made."""
    num_switches, num_clients, num_tokens = 1000, 6, 12
    names = ("lora-0", "lora-1", "lora-2", "sparse")
    prompts = [tuple(random.Random(seed).choices(range(3, 199), k=6)) for seed in range(4)]

    async def steps() -> None:
        async with open_runtime(base, tmp_path / "store") as runtime:
            versions = {}
            for name in names:
                versions[name] = (await runtime.admit(shelf / name, name)).record.version
            expected: dict[tuple[str, tuple[int, ...]], list[int]] = {}
            for name in names:
                for prompt in prompts:
                    expected[versions[name], prompt] = (await runtime.generate(name, prompt, num_tokens)).token_ids
            for prompt in prompts:
                assert expected[versions["lora-0"], prompt] == peft_greedy(
                    hf_model, shelf / "lora-0", prompt, num_tokens
                )
                assert len({tuple(expected[version, prompt]) for version in versions.values()}) == len(names)
            await runtime.admission.alias("default", "live", names[0])
            is_over = False
            answered: list[str] = []

            async def client(seed: int) -> None:
                choose = random.Random(seed)
                while not is_over:
                    prompt = choose.choice(prompts)
                    answer = await runtime.generate("live", prompt, num_tokens)
                    assert answer.version is not None
                    assert answer.token_ids == expected[answer.version, prompt]
                    answered.append(answer.version)

            clients = [asyncio.ensure_future(client(seed)) for seed in range(num_clients)]
            choose = random.Random(0)
            for i in range(num_switches):
                name = choose.choice(names)
                await runtime.admission.alias("default", "live", name if i % 2 else f"{name}@{versions[name][:12]}")
                assert runtime.engine.resolve("default", "live").version == versions[name]
                if any(task.done() for task in clients):
                    break
            is_over = True
            await asyncio.gather(*clients)
            assert len(answered) > 50
            assert set(answered) == set(versions.values())

    run(steps())
