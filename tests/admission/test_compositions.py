"""Compositions through the whole runtime: uploaded, proven one by one, composed, evicted, reloaded, after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.core import Binding, BindingPart, GenerationRequest, SamplingParams
from deltaserve.errors import AdapterUnavailable, CompositionRefused
from deltaserve.model.base import BaseModel
from deltatest.peft_adapters import make_peft_ia3, make_peft_lora, make_sparse
from deltatest.runtime_factory import SMALL, TinyRuntime, open_runtime
from deltatest.sum_of_deltas import Parts, logits_of, summed

PROMPT = [5, 17, 3, 44, 90, 12]
NUM_TOKENS = 8
COMPOSED: tuple[Parts, ...] = (
    (("lora", 0.7), ("sparse", (0.5, 1.0))),
    (("sparse", 1.0), ("ia3", 0.6)),
    (("ia3", (1.0, 0.4)), ("lora", -0.5)),
)


@pytest.fixture(scope="module")
def folders(base: BaseModel, hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "lora": make_peft_lora(hf_model, root / "lora", rank=3, std=0.2, seed=1),
        "sparse": make_sparse(base.spec, root / "sparse", seed=2),
        "ia3": make_peft_ia3(hf_model, root / "ia3", std=0.1, seed=3),
        "dora": make_peft_lora(hf_model, root / "dora", rank=2, use_dora=True, std=0.1, seed=4),
    }


def run(steps: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(steps, 120))


async def compose(runtime: TinyRuntime, *parts: BindingPart, request_id: str) -> list[int]:
    request = GenerationRequest(
        request_id, tuple(PROMPT), SamplingParams(NUM_TOKENS, temperature=0.0, ignore_eos=True), Binding(parts)
    )
    return [token async for output in runtime.engine.submit(request) for delta in output.deltas for token in delta[1]]


def parts_of(runtime: TinyRuntime, named: Parts) -> list[BindingPart]:
    found = []
    for name, strength in named:
        ends = strength if isinstance(strength, tuple) else (strength, strength)
        found.append(BindingPart(str(runtime.engine.resolve("default", name).version), *ends))
    return found


async def ask_all(runtime: TinyRuntime) -> list[list[int]]:
    jobs = [compose(runtime, *parts_of(runtime, each), request_id=f"c{i}") for i, each in enumerate(COMPOSED)]
    return list(await asyncio.gather(*jobs))


def greedy(subject: torch.nn.Module) -> list[int]:
    ids = list(PROMPT)
    for _ in range(NUM_TOKENS):
        ids.append(int(logits_of(subject, ids)[-1].argmax()))
    return ids[len(PROMPT) :]


def test_proven_parts_are_composed_without_a_proof_of_the_sum(
    base: BaseModel, hf_model: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two slots for three pairs: each pair evicts a part of the one before, and answers the same when it is back."""

    async def steps() -> None:
        limits = replace(SMALL, adapter_slots=2)
        async with open_runtime(base, tmp_path / "store", limits=limits, check_each_step=True) as runtime:
            for name, folder in folders.items():
                await runtime.admit(folder, name)
            probes: list[Binding] = []
            probe = runtime.engine.probe

            async def counted(ids: tuple[int, ...], binding: Binding) -> Any:
                probes.append(binding)
                return await probe(ids, binding)

            runtime.engine.probe = counted  # type: ignore[method-assign]
            first = await ask_all(runtime)
            assert first == [greedy(summed(hf_model, base, folders, each)) for each in COMPOSED]
            assert await ask_all(runtime) == first
            assert not probes
            with pytest.raises(CompositionRefused, match=r"inputs of model\.layers\.0\.mlp\.down_proj"):
                await compose(runtime, *parts_of(runtime, (("ia3", 1.0), ("dora", 1.0))), request_id="mixed")
            gone = parts_of(runtime, COMPOSED[0])
            await runtime.admission.delete("default", "sparse")
            with pytest.raises(AdapterUnavailable, match="no longer served") as caught:
                await compose(runtime, *gone, request_id="gone")
            assert caught.value.param == "adapters[1].id"
        # Other operators: every part is proven again before it is served, the sum is not.
        async with open_runtime(base, tmp_path / "store", operators="test-2") as runtime:
            parts = parts_of(runtime, COMPOSED[2])
            assert runtime.proven.locate(parts[0].version) is None
            assert await compose(runtime, *parts, request_id="again") == first[2]
            assert all(runtime.proven.locate(part.version) for part in parts)

    run(steps())
