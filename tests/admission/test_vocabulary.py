"""Adapters of embedding, head and norms end to end: upload, proof, answers equal to PEFT's, eviction and reload; and
every way in which an answer is read sees the changed rows."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.admission import proof as proof_module
from deltaserve.admission.proof import probe_ids
from deltaserve.core import GenerationRequest, RequestOutput
from deltaserve.deltas import fold as fold_module
from deltaserve.errors import AdapterRefused
from deltaserve.model.base import BaseModel
from deltatest.admission_rig import Rig, run
from deltatest.engine_fakes import request as make_request
from deltatest.peft_adapters import edit_config, edit_tensors, peft_greedy, peft_logits
from deltatest.real_engine import RealRig, fold_folder, real_rig
from deltatest.runtime_factory import SMALL, open_runtime
from deltatest.vocabulary_adapters import TOKENS, make_vocabulary_adapter

PROMPT = (*TOKENS, *range(90, 122), *TOKENS)  # more than two blocks, which the prefix cache keeps
SERVED = (
    "tokens",
    "tokens-head",
    "tokens-alone",
    "lora-embedding",
    "lora-both",
    "dora-embedding",
    "dora-both",
    "bias-head",
    "saved",
    "saved-norms",
    "saved-linears",
)


@pytest.fixture(scope="module")
def folders(hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabulary")
    return {
        kind: make_vocabulary_adapter(kind, hf_model, root / kind, target="q_proj", norm="norm", seed=seed)
        for seed, kind in enumerate(SERVED)
    }


def test_every_kind_lives_through_upload_serving_eviction_and_reload(
    base: BaseModel, hf_model: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Two slots for all: every wave of requests evicts what the wave before has loaded. The prompt is the same for all
    adapters and the base, so a block of the prefix cache that went to the wrong one would change an answer."""

    async def ask_all() -> list[list[int]]:
        jobs = [runtime.generate(name, PROMPT, 12) for name in ("tiny", *folders)]
        return [answer.token_ids for answer in await asyncio.wait_for(asyncio.gather(*jobs), 120)]

    async def steps() -> None:
        nonlocal runtime
        async with open_runtime(base, tmp_path / "store", limits=replace(SMALL, adapter_slots=2)) as runtime:
            for name, folder in folders.items():
                result = await runtime.admit(folder, name)
                assert result.evidence.max_error <= result.evidence.tolerance
                assert result.evidence.effect > 10 * result.evidence.tolerance, f"{name} has no effect to prove"
            first = await ask_all()
            assert first == [peft_greedy(hf_model, folder, PROMPT, 12) for folder in (None, *folders.values())]
            assert len({tuple(answer) for answer in first}) > len(folders) // 2
            assert await ask_all() == first
        async with open_runtime(base, tmp_path / "store") as runtime:
            assert await ask_all() == first

    runtime: Any = None
    run(steps())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_is_proven_in_narrow_dtypes(
    load: Callable[[torch.dtype], BaseModel], hf_model: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Changes as large as the rows themselves; far larger ones make logits whose rounding the base does not know."""

    async def steps() -> None:
        async with open_runtime(load(dtype), tmp_path / "store") as runtime:
            for name in SERVED:
                folder = make_vocabulary_adapter(
                    name, hf_model, tmp_path / name, target="q_proj", norm="norm", std=0.03
                )
                result = await runtime.admit(folder, name)
                assert result.evidence.max_error <= result.evidence.tolerance

    run(steps())


def answers_of(rig: RealRig, request: GenerationRequest) -> list[RequestOutput]:
    rig.engine.add(request, rig.engine.clock())
    outputs: list[RequestOutput] = []
    while rig.engine.open_ids:
        outputs += rig.engine.step().outputs
    return outputs


@pytest.mark.parametrize("kind", ["tokens", "lora-both"])
def test_logprobs_of_prompts_and_of_sampled_tokens_see_the_changed_rows(
    base: BaseModel, hf_model: Any, folders: dict[str, Path], kind: str
) -> None:
    rig = real_rig(base, {kind: fold_folder(folders[kind], base)})
    options = {"max_tokens": 6, "temperature": 0.8, "seed": 5, "logprobs": 2, "prompt_logprobs": 1, "ignore_eos": True}
    outputs = answers_of(rig, make_request("sampled", list(PROMPT), kind, **options))
    tokens = [token for output in outputs for delta in output.deltas for token in delta.token_ids]
    entries = [entry for output in outputs for delta in output.deltas for entry in delta.logprobs]
    wanted = torch.log_softmax(peft_logits(hf_model, folders[kind], [*PROMPT, *tokens]), dim=-1)
    told = outputs[0].prompt_logprobs
    assert told is not None
    for position, entry in enumerate([*told, *entries]):
        if entry is not None:
            row = wanted[position - 1]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [token for token, _ in entry.top] == row.topk(len(entry.top)).indices.tolist()
    again = answers_of(rig, make_request("again", list(PROMPT), kind, **options | {"prompt_logprobs": None}))
    assert again[0].num_cached_tokens >= 32
    assert [token for output in again for delta in output.deltas for token in delta.token_ids] == tokens
    others = answers_of(rig, make_request("base", list(PROMPT), max_tokens=1))
    assert others[0].num_cached_tokens == 0, "the base must not read an adapter's blocks"


def test_probes_meet_trained_tokens(rig: Rig) -> None:
    ids = probe_ids("v", rig.base.spec, 64, sorted(TOKENS))
    assert set(ids[::2]) <= set(TOKENS)
    assert len(set(ids[::2])) > 3
    assert not set(ids[1::2]) <= set(TOKENS)
    assert probe_ids("v", rig.base.spec, 64) != ids


@pytest.mark.parametrize("kind", ["tokens", "saved"])
def test_rows_that_are_served_wrongly_do_not_pass_the_door(
    rig: Rig, folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fold_module.fold_rows

    def shifted(*arguments: Any) -> Any:
        return {name: replace(term, values=term.values.roll(1, 0)) for name, term in made(*arguments).items()}

    monkeypatch.setattr(fold_module, "fold_rows", shifted)
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admit(folders[kind], kind))
    assert [reason.code for reason in caught.value.reasons] == ["proof_failed"]


def test_rows_of_tokens_that_chance_does_not_meet_are_proven(
    rig: Rig, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an untied head nothing but the embedding tells of them: an adapter of one row would seem to do nothing."""
    one = make_one_row(rig, folders)
    seen: list[list[int]] = []
    real = proof_module.trained_tokens
    monkeypatch.setattr(proof_module, "trained_tokens", lambda *a: seen.append(real(*a)) or seen[-1])
    result = run(rig.admit(one, "one"))
    assert seen == [[7]]
    assert result.evidence.effect > 10 * result.evidence.tolerance


def make_one_row(rig: Rig, folders: dict[str, Path]) -> Path:
    folder = Path(str(folders["tokens-alone"]) + "-one")
    shutil.copytree(folders["tokens-alone"], folder, dirs_exist_ok=True)
    edit_config(folder, token_indices=[7])
    row = 0.3 * torch.ones(1, rig.base.hidden_size)
    changes: dict[str, torch.Tensor | None] = {
        "base_model.model.lm_head.trainable_tokens_delta": None,
        "base_model.model.model.embed_tokens.trainable_tokens_delta": row,
    }
    return edit_tensors(folder, changes)


def test_a_copy_of_another_base_is_refused(rig: Rig, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(folders["lora-embedding"], folder)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    edit_tensors(folder, {name: torch.ones(rig.base.vocab_size, rig.base.hidden_size)})
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admit(folder, "copy"))
    assert [(r.code, r.where) for r in caught.value.reasons] == [("base_mismatch", "model.embed_tokens")]
