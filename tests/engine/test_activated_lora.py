"""Activated LoRA equals PEFT's, in company too; what comes before the invocation is the base's to the bit."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.api.activation import start_of
from deltaserve.api.target import NEVER
from deltaserve.core import Binding, BindingPart, GenerationRequest
from deltaserve.deltas.fold import dense_delta
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.model.base import BaseModel, load_base
from deltatest.engine_fakes import request as make_request
from deltatest.mixed_batch import prompts
from deltatest.peft_adapters import make_peft_lora, make_sparse
from deltatest.real_engine import RealRig, fold_folder, real_rig
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

INVOCATION = [7, 9, 7]
NUM_TOKENS = 6


def test_the_last_occurrence_counts() -> None:
    assert start_of([7, 9, 7, 9, 7, 1], INVOCATION) == 2  # overlapping ones too
    assert start_of([7, 9, 7], INVOCATION) == 0
    assert start_of([1, 7, 9, 7], INVOCATION) == 1
    assert start_of([7, 9, 7, 7, 9], INVOCATION) == 0
    assert start_of([7, 9, 1, 7], INVOCATION) is None
    assert start_of([7, 9], INVOCATION) is None
    assert start_of([3, 5, 3], [3]) == 2
    assert start_of((), [3]) is None


@dataclass
class Setting:
    base: BaseModel
    model: Any
    folder: Path
    adapters: dict[str, FoldedAdapter]

    def subject(self, name: str = "alora") -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(copy.deepcopy(self.model), str(self.folder.with_name(name))).eval()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("activated")
    base = load_base(build_tiny_model("llama", root / "base"), dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(root / "base", attn_implementation="eager").eval()
    folder = make_peft_lora(model, root / "alora", rank=4, std=0.2, alora_invocation_tokens=INVOCATION)
    lora = make_peft_lora(model, root / "lora", rank=3, std=0.2, seed=5)
    sparse = make_sparse(base.spec, root / "sparse", seed=6)
    # Its B has a bias, which acts where B does.
    called: Any = {"alora_invocation_tokens": INVOCATION, "lora_bias": True}
    biased = make_peft_lora(model, root / "biased", rank=2, std=0.2, seed=7, **called)
    adapters = {path.name: fold_folder(path, base) for path in (folder, lora, sparse, biased)}
    return Setting(base, model, folder, adapters)


def ask(name: str, prompt: list[int], *others: str) -> GenerationRequest:
    start = start_of(prompt, INVOCATION)
    parts = [BindingPart(version) for version in others]
    parts += [] if start is None else [BindingPart("alora", start_position=start)]
    return make_request(name, prompt, binding=Binding(tuple(parts)), max_tokens=NUM_TOKENS, ignore_eos=True)


def prompts_with() -> dict[str, list[int]]:
    """Invocations at the start, in the middle, twice, across and at the edge of blocks and chunks, at the end."""
    plain = prompts([40, 33, 21, 50, 18, 30], VOCAB_SIZE)
    middle, twice, first, late, end, absent = ([12 if token in (7, 9) else token for token in ids] for ids in plain)
    middle[15:18] = INVOCATION
    twice[3:6] = twice[16:19] = INVOCATION
    first[:3] = INVOCATION
    late[37:40] = INVOCATION
    end[-3:] = INVOCATION
    return {"middle": middle, "twice": twice, "first": first, "late": late, "end": end, "absent": absent}


@torch.no_grad()
def oracle(setting: Setting, prompt: list[int], said: list[int], name: str = "alora") -> Tensor:
    """PEFT's logits for what was said, with the offset it finds in the prompt."""
    ids, start = [*prompt, *said], start_of(prompt, INVOCATION)
    offset = None if start is None else len(ids) - start
    logits = setting.subject(name)(torch.tensor([ids]), alora_offsets=[offset]).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def run(rig: RealRig, *requests: GenerationRequest) -> dict[str, tuple[list[int], Tensor]]:
    first = 1 + max(rig.runner.rows, default=-1)
    tokens = rig.run(*requests)
    return {
        request.request_id: (tokens[request.request_id][0], torch.stack(rig.runner.rows[first + i]))
        for i, request in enumerate(requests)
    }


@pytest.mark.parametrize("budget", [512, 23])
def test_each_prompt_equals_peft_in_one_batch(setting: Setting, budget: int) -> None:
    given = prompts_with()
    requests = [ask(name, ids) for name, ids in given.items()]
    others = [make_request("base", given["late"], max_tokens=9), make_request("lora", given["late"], "lora")]
    found = run(real_rig(setting.base, setting.adapters, max_num_batched_tokens=budget), *requests, *others)
    for name, ids in given.items():
        said, rows = found[name]
        wanted = oracle(setting, ids, said)
        assert (rows - wanted).abs().max() <= 1e-4, name
        assert wanted.argmax(-1).tolist() == said
        assert (start_of(ids, INVOCATION) is None) == (name == "absent")


def test_peft_generates_the_same(setting: Setting) -> None:
    """What PEFT itself finds in the prompt, once, before its first token."""
    given = prompts_with()
    rig = real_rig(setting.base, setting.adapters)
    for name in ("twice", "absent", "end"):
        subject = setting.subject()
        subject.generation_config.eos_token_id = None
        prompt = torch.tensor([given[name]])
        with torch.no_grad():
            said = subject.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NUM_TOKENS,
                pad_token_id=0,
            )[0, prompt.shape[1] :]  # fmt: skip
        assert run(rig, ask(name, given[name]))[name][0] == said.tolist(), name


def test_a_bias_of_b_acts_where_b_does_and_never_is_never(setting: Setting) -> None:
    given = prompts_with()
    start = start_of(given["middle"], INVOCATION) or 0
    biased = Binding((BindingPart("biased", start_position=start),))
    never = Binding((BindingPart("biased", start_position=NEVER), BindingPart("lora")))
    requests = [
        make_request("biased", given["middle"], binding=biased, max_tokens=NUM_TOKENS, ignore_eos=True),
        make_request("never", given["absent"], binding=never, max_tokens=NUM_TOKENS, ignore_eos=True),
        make_request("lora", given["absent"], "lora", max_tokens=NUM_TOKENS, ignore_eos=True),
    ]
    found = run(real_rig(setting.base, setting.adapters), *requests)
    said, rows = found["biased"]
    assert (rows - oracle(setting, given["middle"], said, "biased")).abs().max() <= 1e-4
    assert torch.equal(found["never"][1], found["lora"][1])


def test_rows_before_the_invocation_are_the_base_s_and_share_its_blocks(setting: Setting) -> None:
    prompt = prompts_with()["late"]
    rig = real_rig(setting.base, setting.adapters)

    def scores(*parts: BindingPart) -> tuple[list[float], int]:
        """Log probabilities of the prompt's tokens, and how many tokens came from the cache."""
        request = make_request("r", prompt, binding=Binding(parts), max_tokens=1, prompt_logprobs=0)
        rig.engine.add(request, rig.engine.clock())
        told, cached = (), 0
        while rig.engine.open_ids:
            for output in rig.engine.step().outputs:
                told, cached = output.prompt_logprobs or told, max(cached, output.num_cached_tokens)
        return [entry.logprob for entry in told if entry is not None], cached

    def cached(*parts: BindingPart) -> int:
        rig.engine.add(make_request("c", prompt, binding=Binding(parts), max_tokens=1), rig.engine.clock())
        count = 0
        while rig.engine.open_ids:
            count += sum(output.num_cached_tokens for output in rig.engine.step().outputs)
        return count

    activated, always = BindingPart("alora", start_position=37), BindingPart("alora")
    base = scores()[0]
    found = scores(activated)[0]
    assert found[:37] == base[:37]
    assert max(abs(a - b) for a, b in zip(found[37:], base[37:], strict=True)) > 1e-2
    assert cached(activated) == 48  # blocks of its own from position 32 on by now
    rig = real_rig(setting.base, setting.adapters)
    assert cached() == 0
    assert cached(activated) == 32  # the base's, up to the block in which it begins
    assert cached(always) == 0
    assert cached(BindingPart("lora"), activated) == 0


def test_beside_parts_that_always_act(setting: Setting) -> None:
    """Rows before the invocation have the other parts alone; the sum of all is PEFT's mask over their sum."""
    prompt = prompts_with()["middle"]
    request = ask("both", prompt, "sparse")
    said, rows = run(real_rig(setting.base, setting.adapters), request)["both"]
    subject = setting.subject()
    with torch.no_grad():
        for name in setting.adapters["sparse"].terms:
            weight = subject.base_model.model.get_submodule(name).base_layer.weight
            weight += dense_delta(setting.adapters["sparse"], name, setting.base.spec)
        ids = [*prompt, *said]
        offset = len(ids) - (start_of(prompt, INVOCATION) or 0)
        wanted = subject(torch.tensor([ids]), alora_offsets=[offset]).logits[0, len(prompt) - 1 : -1].float()
    assert (rows - wanted).abs().max() <= 1e-4
