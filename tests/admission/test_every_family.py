"""One adapter of each kind, all in one request, against the fp32 sum made by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltaserve.core import Binding, BindingPart, GenerationRequest, SamplingParams
from deltaserve.deltas.vocabulary import row_changes
from deltaserve.errors import CompositionRefused
from deltaserve.model.base import BaseModel
from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.formats import read_adapter
from deltatest.apart_adapters import hooked_logits, make_bottleneck, make_dense
from deltatest.block_adapters import make_blocks
from deltatest.composed_judge import ComposedJudge
from deltatest.peft_adapters import base_logits, make_peft_lora, make_sparse
from deltatest.prefix_adapters import make_prefix
from deltatest.rotation_kinds import make_rotation
from deltatest.runtime_factory import TinyRuntime, open_runtime
from deltatest.sum_of_deltas import Parts, summed
from deltatest.vocabulary_adapters import TOKENS, make_vocabulary_adapter

IDS = (*TOKENS, 5, 17, 60, 44)
BOTTLENECK = 0.7
PARTS: Parts = (
    ("rows", 0.5),
    ("block", -0.6),
    ("dense", (0.9, 0.3)),
    ("bottleneck", BOTTLENECK),
    ("rotation", 1.0),
    ("lora", 1.2),
    ("sparse", 0.4),
)


@pytest.fixture(scope="module")
def folders(base: BaseModel, hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {
        "rows": make_vocabulary_adapter("tokens-alone", hf_model, root / "rows", target="q_proj", norm="norm", seed=1),
        "block": make_blocks("both", base.spec, root / "block", seed=2, std=0.1),
        "dense": make_dense(base.spec, root / "dense", "delta", seed=3),
        "bottleneck": make_bottleneck(base.spec, root / "bottleneck", parallel=True, seed=4, std=0.1),
        "rotation": make_rotation(hf_model, root / "rotation", "oft", seed=5),
        "lora": make_peft_lora(hf_model, root / "lora", rank=3, std=0.1, seed=6),
        "sparse": make_sparse(base.spec, root / "sparse", seed=7),
        "prefix": make_prefix(hf_model, root / "prefix", "prefix", seed=8),
    }


def expected(model: Any, base: BaseModel, folders: dict[str, Path], parts: Parts) -> Tensor:
    """Weights, biases and norms are summed, rows of the embedding added, modules hung around the sublayers."""
    changed: Any = summed(model, base, folders, parts)
    modules: list[BottleneckDelta] = []
    for name, strength in parts:
        parsed = read_adapter(folders[name], base.spec)
        modules += [delta for delta in parsed.deltas if isinstance(delta, BottleneckDelta)]
        for matrix, change in row_changes(parsed, base.spec, base).items():
            module = changed.get_submodule(matrix)
            difference = change(torch.arange(module.weight.shape[0]))
            module.weight = nn.Parameter(module.weight.detach() + strength * difference)
    return hooked_logits(changed, "llama", modules, IDS, BOTTLENECK)


async def probed(runtime: TinyRuntime, binding: Binding) -> Tensor:
    logits = await runtime.engine.probe(IDS, binding)
    return torch.frombuffer(bytearray(logits.data), dtype=torch.float32).view(logits.num_tokens, logits.vocab_size)


async def answered(runtime: TinyRuntime, binding: Binding) -> list[int]:
    sampling = SamplingParams(4, temperature=0.0, ignore_eos=True)
    request = GenerationRequest(f"of {len(binding.parts)}", IDS, sampling, binding)
    return [token async for output in runtime.engine.submit(request) for delta in output.deltas for token in delta[1]]


def test_one_adapter_of_each_kind_in_one_request(
    base: BaseModel, hf_model: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    async def steps() -> None:
        async with open_runtime(base, tmp_path / "store", check_each_step=True) as runtime:
            versions = {name: (await runtime.admit(folder, name)).record.version for name, folder in folders.items()}

            def binding_of(parts: Parts) -> Binding:
                ends = {name: at if isinstance(at, tuple) else (at, at) for name, at in parts}
                return Binding(tuple(BindingPart(versions[name], *ends[name]) for name, _ in parts))

            everything = await probed(runtime, binding_of(PARTS))
            wanted = expected(hf_model, base, folders, PARTS)
            limit = 1e-4 * max(1.0, float(wanted.square().mean().sqrt()))
            assert float((everything - wanted).abs().max()) < limit
            for left_out, _ in PARTS:  # each of them is in the sum
                rest = expected(hf_model, base, folders, tuple(part for part in PARTS if part[0] != left_out))
                assert float((rest - wanted).abs().max()) > 100 * limit, left_out
            assert float((wanted - base_logits(hf_model, IDS)).abs().max()) > 100 * limit
            tokens = await answered(runtime, binding_of(PARTS))
            assert tokens[0] == int(everything[-1].argmax())
            with pytest.raises(CompositionRefused, match=r"strength 0\.5 of the kind rotation"):
                await answered(runtime, binding_of((("rotation", 0.5), ("lora", 1.0))))
            behind = await probed(runtime, binding_of((*PARTS, ("prefix", 1.0))))
            judged = ComposedJudge(hf_model, base, folders, (*PARTS, ("prefix", 1.0))).logits(IDS)
            assert float((behind - judged).abs().max()) < limit
            assert float((wanted - judged).abs().max()) > 100 * limit

    asyncio.run(asyncio.wait_for(steps(), 120))
