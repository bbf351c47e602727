"""The promise of the whole server: 64 rows over the base, 8 LoRA, 4 sparse and 4 vector adapters, decoded together,
are each what they are alone, and what PEFT (or folded weights) makes of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaserve import tinybase
from deltaserve.core import GenerationRequest
from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.model.base import BaseModel, load_base
from deltatest.engine_fakes import request as make_request
from deltatest.peft_adapters import (
    make_bitfit,
    make_peft_ia3,
    make_peft_ln_tuning,
    make_peft_lora,
    make_peft_shira,
    make_sparse,
)
from deltatest.real_engine import RealRig, fold_folder, real_rig

torch.set_num_threads(1)

NUM_ROWS = 64
NUM_TOKENS = 16
RANKS = (1, 2, 3, 8, 16, 24, 33, 64)
VECTORS = ("dora", "ia3", "norms", "bitfit")


@dataclass
class Setting:
    base: BaseModel
    model: PreTrainedModel
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]
    requests: list[GenerationRequest]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("mixed")
    base = load_base(tinybase.CHECKPOINT, dtype=torch.float32, cache_dir=root / "digests")
    model = AutoModelForCausalLM.from_pretrained(tinybase.CHECKPOINT, dtype=torch.float32, attn_implementation="eager")
    folders: dict[str, Path] = {}
    for index, rank in enumerate(RANKS):
        targets = ("q_proj", "v_proj") if index % 3 == 1 else ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")
        folders[f"lora{rank}"] = make_peft_lora(
            model,
            root / f"lora{rank}",
            rank=rank,
            alpha=2 * rank,
            targets=targets,
            use_rslora=index % 2 == 1,
            seed=index,
        )
    for index in range(2):
        folders[f"shira{index}"] = make_peft_shira(model, root / f"shira{index}", rank=2 + index, seed=20 + index)
        folders[f"sparse{index}"] = make_sparse(
            base.spec, root / f"sparse{index}", num_entries=200 + 1000 * index, seed=30 + index
        )
    folders["dora"] = make_peft_lora(model, root / "dora", rank=4, use_dora=True, seed=40)
    folders["ia3"] = make_peft_ia3(model, root / "ia3", std=0.1, seed=41)
    folders["norms"] = make_peft_ln_tuning(model, root / "norms", std=0.1, seed=42)
    folders["bitfit"] = make_bitfit(base.spec, root / "bitfit", seed=43)
    adapters = {name: fold_folder(folder, base) for name, folder in folders.items()}
    names = [None, *folders]
    generator = torch.Generator().manual_seed(1)
    requests = []
    for row in range(NUM_ROWS):
        length = 3 + row * 7 % 30
        prompt = torch.randint(0, base.vocab_size, (length,), generator=generator).tolist()
        name = names[row % len(names)]
        requests.append(
            make_request(f"row{row}", prompt, *([name] if name else []), max_tokens=NUM_TOKENS, ignore_eos=True)
        )
    return Setting(base, model, folders, adapters, requests)


@dataclass
class Result:
    rig: RealRig
    tokens: dict[str, list[int]]
    rows: dict[str, list[Tensor]]


def run(setting: Setting, requests: list[GenerationRequest], **options: int) -> Result:
    rig = real_rig(setting.base, setting.adapters, **options)
    tokens = {name: sequences[0] for name, sequences in rig.run(*requests).items()}
    # Sequence ids count up in order of arrival.
    return Result(rig, tokens, {request.request_id: rig.runner.rows[i] for i, request in enumerate(requests)})


@pytest.fixture(scope="module")
def mixed(setting: Setting) -> Result:
    return run(setting, setting.requests, max_num_batched_tokens=2048)


def test_all_rows_really_share_steps(mixed: Result) -> None:
    assert mixed.rig.runner.max_step_seqs == NUM_ROWS
    assert mixed.rig.max_distinct_adapters == len(RANKS) + 4 + len(VECTORS)


def test_each_row_equals_itself_alone(setting: Setting, mixed: Result) -> None:
    rig = real_rig(setting.base, setting.adapters)
    for index, request in enumerate(setting.requests):
        assert rig.run(request)[request.request_id] == [mixed.tokens[request.request_id]]
        pairs = zip(mixed.rows[request.request_id], rig.runner.rows[index], strict=True)
        worst = max(float((together - single).abs().max()) for together, single in pairs)
        assert worst <= 1e-4, f"{request.request_id} differs by {worst}"
    assert rig.runner.max_step_seqs == 1


def test_small_budgets_and_forced_preemption_change_no_token(setting: Setting, mixed: Result) -> None:
    tight = run(setting, setting.requests, num_blocks=24, num_slots=5, max_num_seqs=40, max_num_batched_tokens=48)
    assert tight.rig.num_preempted > 0
    assert tight.tokens == mixed.tokens


def check_rows(setting: Setting, mixed: Result, name: str | None, oracle: Callable[[list[int]], Tensor]) -> None:
    """Every row of ``name``: ``oracle(ids)`` gives the logits [T, vocab] that the engine must have sampled from."""
    checked = 0
    for request in setting.requests:
        if (request.binding.versions or (None,))[0] != name:
            continue
        tokens = mixed.tokens[request.request_id]
        ids = [*request.prompt_ids, *tokens]
        wanted = oracle(ids)[len(request.prompt_ids) - 1 : -1]
        found = torch.stack(mixed.rows[request.request_id])
        assert wanted.argmax(dim=-1).tolist() == tokens
        assert (found - wanted).abs().max() <= 1e-4
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("name", [None, *(f"lora{rank}" for rank in RANKS), "shira0", "shira1", "dora", "ia3", "norms"])
def test_rows_equal_peft(setting: Setting, mixed: Result, name: str | None) -> None:
    subject: torch.nn.Module = setting.model
    if name is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject = PeftModel.from_pretrained(copy.deepcopy(setting.model), str(setting.folders[name]))

    @torch.no_grad()
    def oracle(ids: list[int]) -> Tensor:
        return subject.eval()(torch.tensor([ids])).logits[0].float()

    check_rows(setting, mixed, name, oracle)


@pytest.mark.parametrize("name", ["sparse0", "sparse1", "shira1", "lora33"])
def test_rows_equal_folded_weights(setting: Setting, mixed: Result, name: str) -> None:
    folded = copy.deepcopy(setting.model)
    for linear, delta in dense_deltas(setting.adapters[name], setting.base.spec).items():
        with torch.no_grad():
            folded.get_submodule(linear).weight += delta()

    @torch.no_grad()
    def oracle(ids: list[int]) -> Tensor:
        return folded(torch.tensor([ids])).logits[0].float()

    check_rows(setting, mixed, name, oracle)


def test_adapters_do_change_what_is_said(setting: Setting) -> None:
    prompt = setting.requests[0].prompt_ids
    names = [None, *setting.folders]
    requests = [
        make_request(f"n{i}", prompt, *([name] if name else []), max_tokens=NUM_TOKENS, ignore_eos=True)
        for i, name in enumerate(names)
    ]
    result = run(setting, requests)
    firsts = [result.rows[f"n{i}"][0] for i in range(len(names))]
    for i, row in enumerate(firsts):
        for other in firsts[:i]:
            assert (row - other).abs().max() > 1e-2
