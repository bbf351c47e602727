"""Several adapters a request equal the offline sum of their weights, and PEFT where it sums; alone and in company."""

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

from deltaserve.core import GenerationRequest
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.engine.batch import ScheduledPart
from deltaserve.errors import CompositionRefused
from deltaserve.model.base import BaseModel, load_base
from deltatest.engine_fakes import request as make_request
from deltatest.mixed_batch import MixedBatch, prompts
from deltatest.peft_adapters import (
    make_bitfit,
    make_gates,
    make_peft_ia3,
    make_peft_ln_tuning,
    make_peft_lora,
    make_peft_shira,
    make_sparse,
)
from deltatest.real_engine import RealRig, fold_folder, real_rig
from deltatest.sum_of_deltas import Parts, binding_of, logits_of, summed
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

NUM_TOKENS = 14
COMPOSED: dict[str, Parts] = {
    "two low-rank": (("lora", 0.8), ("rslora", -0.5)),
    "low-rank and sparse": (("lora", 1.0), ("sparse", 0.7)),
    "two sparse": (("sparse", 1.0), ("shira", 1.0)),
    "two magnitudes": (("dora", 0.6), ("dora2", 0.7)),
    "scales of outputs and inputs": (("ia3", 0.5), ("ia3b", 0.8), ("lora", 0.4)),
    "norms, biases and low-rank": (("norms", 0.5), ("bitfit", 0.7), ("lora", 1.0)),
    "gates twice over": (("gates", 0.5), ("gates2", -0.3)),
    "every kind that adds": (("lora", 0.5), ("sparse", 0.5), ("dora", 0.5), ("norms", 0.3), ("bitfit", 0.4)),
    "one, deeper and deeper": (("lora", (0.3, 1.0)),),
    "profiles": (("dora", (1.0, 0.2)), ("sparse", (-0.5, 1.0)), ("lora", (0.0, 1.0)), ("norms", (0.2, 0.6))),
    "scales with a profile": (("ia3", (0.0, 1.0)), ("ia3b", (0.9, 0.3))),
    "nothing left": (("lora", 0.0), ("dora", 0.0), ("norms", 0.0), ("sparse", 0.0)),
}


@dataclass
class Setting:
    base: BaseModel
    model: Any
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]
    requests: dict[str, GenerationRequest]

    def rig(self, **options: Any) -> RealRig:
        return real_rig(self.base, self.adapters, **options)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("composed")
    folder = build_tiny_model("qwen2", root / "base")  # has biases of its own
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders = {
        "lora": make_peft_lora(model, root / "lora", rank=5, std=0.1, seed=1),
        "rslora": make_peft_lora(model, root / "rslora", rank=3, use_rslora=True, std=0.1, seed=2),
        "dora": make_peft_lora(model, root / "dora", rank=3, use_dora=True, std=0.1, seed=3),
        "dora2": make_peft_lora(model, root / "dora2", rank=2, use_dora=True, targets=("q_proj", "up_proj"), seed=4),
        "shira": make_peft_shira(model, root / "shira", std=0.2, seed=5),
        "ia3": make_peft_ia3(model, root / "ia3", std=0.1, seed=6),
        "ia3b": make_peft_ia3(model, root / "ia3b", std=0.1, seed=7),
        "norms": make_peft_ln_tuning(model, root / "norms", std=0.1, seed=8),
        "sparse": make_sparse(base.spec, root / "sparse", seed=9),
        "bitfit": make_bitfit(base.spec, root / "bitfit", seed=10),
        "gates": make_gates(base.spec, root / "gates", seed=11),
        "gates2": make_gates(base.spec, root / "gates2", seed=12),
    }
    parts: dict[str, Parts] = {"base": (), **COMPOSED, **{name: ((name, 1.0),) for name in folders}}
    all_ids = prompts([3 + 5 * i % 19 for i in range(len(parts))], VOCAB_SIZE)
    requests = {
        name: make_request(name, ids, binding=binding_of(own), max_tokens=NUM_TOKENS, ignore_eos=True)
        for (name, own), ids in zip(parts.items(), all_ids, strict=True)
    }
    return Setting(base, model, folders, {name: fold_folder(path, base) for name, path in folders.items()}, requests)


@dataclass
class Answer:
    tokens: list[int]
    rows: list[Tensor]


def answers(rig: RealRig, *requests: GenerationRequest) -> dict[str, Answer]:
    # Sequence ids count up in order of arrival.
    first = 1 + max(rig.runner.rows, default=-1)
    tokens = rig.run(*requests)
    return {
        request.request_id: Answer(tokens[request.request_id][0], rig.runner.rows[first + i])
        for i, request in enumerate(requests)
    }


@pytest.fixture(scope="module")
def mixed(setting: Setting) -> dict[str, Answer]:
    """All compositions, all adapters alone, and the base, in one batch; prompts come in several chunks."""
    rig = setting.rig(max_num_batched_tokens=90)
    found = answers(rig, *setting.requests.values())
    assert rig.runner.max_step_seqs == len(setting.requests)
    return found


def check(setting: Setting, name: str, answer: Answer, oracle: torch.nn.Module) -> None:
    prompt = setting.requests[name].prompt_ids
    wanted = logits_of(oracle, [*prompt, *answer.tokens])[len(prompt) - 1 : -1]
    assert (torch.stack(answer.rows) - wanted).abs().max() <= 1e-4, name


@pytest.mark.parametrize("name", COMPOSED)
def test_each_equals_the_sum_of_weights_in_company(setting: Setting, mixed: dict[str, Answer], name: str) -> None:
    oracle = summed(setting.model, setting.base, setting.folders, COMPOSED[name])
    check(setting, name, mixed[name], oracle)
    prompt = setting.requests[name].prompt_ids
    effect = (logits_of(oracle, prompt) - logits_of(setting.model, prompt)).abs().max()
    assert (effect > 1e-2) == (name != "nothing left"), "a sum without effect proves nothing"


def test_each_is_alone_what_it_is_in_company(setting: Setting, mixed: dict[str, Answer]) -> None:
    rig = setting.rig(max_num_batched_tokens=90)
    for name, request in setting.requests.items():
        alone = answers(rig, request)[name]
        assert alone.tokens == mixed[name].tokens
        assert all((a - b).abs().max() <= 1e-4 for a, b in zip(alone.rows, mixed[name].rows, strict=True)), name


def test_company_is_not_felt_to_the_bit(setting: Setting) -> None:
    """The rows of every composition in shared steps, prompts in pieces of seven, against each by itself."""
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    bindings = [setting.requests[name].binding for name in ("base", "lora", *COMPOSED)]
    parts = [
        tuple(ScheduledPart(batch.slots[p.version], p.scale_first, p.scale_last) for p in binding.parts)
        for binding in bindings
    ]
    ids = prompts([5 + i for i in range(len(parts))], VOCAB_SIZE)
    together = [rows.clone() for rows in batch.driver.logits(ids, parts, chunk=7)]
    for own_ids, own_parts, rows in zip(ids, parts, together, strict=True):
        assert torch.equal(batch.driver.logits([own_ids], [own_parts], chunk=7)[0], rows)


def test_strength_0_of_everything_is_the_base_to_the_bit(setting: Setting) -> None:
    rig, prompt = setting.rig(), setting.requests["nothing left"].prompt_ids
    found = answers(
        rig,
        make_request("base", prompt, max_tokens=NUM_TOKENS),
        make_request("zero", prompt, binding=binding_of(COMPOSED["nothing left"]), max_tokens=NUM_TOKENS),
    )
    assert all(torch.equal(a, b) for a, b in zip(found["base"].rows, found["zero"].rows, strict=True))


def test_a_flat_profile_is_a_number_and_order_is_only_rounding(setting: Setting) -> None:
    rig, prompt = setting.rig(), prompts([9], VOCAB_SIZE)[0]
    one: Parts = (("lora", 0.5), ("sparse", 2.0))
    flat: Parts = (("lora", (0.5, 0.5)), ("sparse", (2.0, 2.0)))
    named: dict[str, Parts] = {"one": one, "flat": flat, "other way": one[::-1]}
    requests = [make_request(name, prompt, binding=binding_of(parts), max_tokens=3) for name, parts in named.items()]
    found = answers(rig, *requests)
    assert all(torch.equal(a, b) for a, b in zip(found["one"].rows, found["flat"].rows, strict=True))
    assert (found["one"].rows[0] - found["other way"].rows[0]).abs().max() < 1e-4


def peft(setting: Setting, *names: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = PeftModel.from_pretrained(copy.deepcopy(setting.model), str(setting.folders[names[0]]), names[0])
        for name in names[1:]:
            subject.load_adapter(str(setting.folders[name]), name)
    return subject


def test_weighted_sums_of_peft(setting: Setting, mixed: dict[str, Answer]) -> None:
    """Concatenated ranks are the exact sum; PEFT takes a negative weight."""
    subject = peft(setting, "lora", "rslora")
    subject.add_weighted_adapter(["lora", "rslora"], [0.8, -0.5], "sum", combination_type="cat")
    subject.set_adapter("sum")
    check(setting, "two low-rank", mixed["two low-rank"], subject)


@pytest.mark.parametrize("names", [("lora", "rslora"), ("shira", "shira2")])
def test_several_active_adapters_of_peft(setting: Setting, tmp_path: Path, names: tuple[str, ...]) -> None:
    if "shira2" in names:
        setting.folders["shira2"] = make_peft_shira(setting.model, tmp_path / "shira2", std=0.2, rank=3, seed=13)
        setting.adapters["shira2"] = fold_folder(setting.folders["shira2"], setting.base)
    subject = peft(setting, *names)
    subject.base_model.set_adapter(list(names))
    request = make_request("both", setting.requests["base"].prompt_ids, *names, max_tokens=3)
    setting.requests["both"] = request
    check(setting, "both", answers(setting.rig(), request)["both"], subject)


def test_weighted_scales_of_peft(setting: Setting) -> None:
    """PEFT sums the scales themselves, which is the sum of differences where the weights sum to one."""
    subject = peft(setting, "ia3", "ia3b")
    subject.add_weighted_adapter(["ia3", "ia3b"], [0.7, 0.3], "sum")
    subject.set_adapter("sum")
    binding = binding_of((("ia3", 0.7), ("ia3b", 0.3)))
    setting.requests["ia3s"] = make_request("ia3s", prompts([8], VOCAB_SIZE)[0], binding=binding, max_tokens=3)
    check(setting, "ia3s", answers(setting.rig(), setting.requests["ia3s"])["ia3s"], subject)


def test_mixed_sides_are_refused_and_hold_nothing(setting: Setting) -> None:
    """The first request learns it from the loads, later ones need none; neighbours are served."""
    rig = setting.rig()
    for turn in range(2):
        rig.engine.add(make_request(f"bad{turn}", [5, 6], "ia3", "lora", "dora"), rig.engine.clock())
        rig.engine.add(make_request(f"good{turn}", [5, 6], "ia3", "lora", max_tokens=2), rig.engine.clock())
        failures = []
        while rig.engine.open_ids:
            failures += rig.engine.step().failures
            rig.engine.check_integrity()
        ((request_id, error),) = failures
        assert request_id == f"bad{turn}"
        assert isinstance(error, CompositionRefused)
        assert {(reason.code, reason.where) for reason in error.reasons} == {("mixed_sides", "adapters[0]")}
        assert "down_proj" in error.message
    assert not any(status.num_pins for status in rig.residency.status())


def test_prefixes_are_shared_by_equal_compositions_alone(setting: Setting) -> None:
    rig, prompt = setting.rig(), prompts([40], VOCAB_SIZE)[0]

    def cached(parts: Parts) -> int:
        rig.engine.add(make_request("r", prompt, binding=binding_of(parts), max_tokens=1), rig.engine.clock())
        count = 0
        while rig.engine.open_ids:
            count += sum(output.num_cached_tokens for output in rig.engine.step().outputs)
        return count

    pair: Parts = (("lora", 0.8), ("sparse", 1.0))
    assert cached(pair) == 0
    assert cached(pair) == 32
    others: list[Parts] = [
        pair[::-1],
        pair[:1],
        (("lora", 0.8), ("sparse", (1.0, 0.5))),
        (("lora", 0.9), ("sparse", 1.0)),
        (("lora", 0.8), ("shira", 1.0)),
        (*pair, ("norms", 1.0)),
        (),
    ]
    assert [cached(parts) for parts in others] == [0] * len(others)
