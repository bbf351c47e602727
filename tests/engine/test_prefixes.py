"""Adapters of virtual tokens in the real engine: PEFT's answers, in mixed batches, through cache, preemption and
eviction; and what a prefix refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.core import Binding, BindingPart
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.errors import ContextLengthExceeded, InvalidRequest
from deltaserve.model.base import BaseModel, load_base
from deltatest.engine_fakes import request as make_request
from deltatest.peft_adapters import make_peft_ia3, make_peft_lora
from deltatest.prefix_adapters import CASES, Oracle, make_prefix, num_tokens
from deltatest.real_engine import RealRig, fold_folder, real_rig
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)
NUM_TOKENS = 12


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Setting:
    base: BaseModel
    model: Any
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]
    oracles: dict[str, Oracle]


def make_setting(architecture: str, root: Path, names: tuple[str, ...]) -> Setting:
    folder = build_tiny_model(architecture, root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "digests")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if model.config.model_type == "gpt2":  # the tests' common sizes name KV heads that GPT-2 does not have
        del model.config.num_key_value_heads
    folders = {name: make_prefix(model, root / name, name, seed=index) for index, name in enumerate(names)}
    adapters = {name: fold_folder(path, base) for name, path in folders.items()}
    return Setting(base, model, folders, adapters, {name: Oracle(model, path) for name, path in folders.items()})


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("prefixes")
    made = make_setting("llama", root, tuple(CASES))
    made.adapters["lora"] = fold_folder(make_peft_lora(made.model, root / "lora", std=0.2), made.base)
    made.adapters["ia3"] = fold_folder(make_peft_ia3(made.model, root / "ia3", std=0.2), made.base)
    return made


def ask(rig: RealRig, request_id: str, prompt: list[int], *versions: str, **options: Any) -> list[list[int]]:
    request = make_request(request_id, prompt, *versions, **{"max_tokens": NUM_TOKENS, "ignore_eos": True, **options})
    return rig.run(request)[request_id]


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_peft_whole_and_in_chunks(name: str, setting: Setting) -> None:
    """A prompt of one token starts by what looks like a decode; one of 40 is computed in chunks."""
    for length, budget in ((1, 256), (40, 256), (40, 7)):
        prompt = ids(length)
        rig = real_rig(setting.base, setting.adapters, max_num_batched_tokens=budget)
        assert ask(rig, "r", prompt, name) == [setting.oracles[name].generate(prompt, NUM_TOKENS)]
        wanted = setting.oracles[name].logits(prompt)[-1]
        assert float((rig.runner.rows[0][0] - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gpt2"])
def test_windows_soft_caps_and_learned_positions(architecture: str, tmp_path: Path) -> None:
    """Windows of 24 slide over virtual tokens as over others; GPT-2's positions begin behind them."""
    setting = make_setting(architecture, tmp_path, ("cartridge", "prompt"))
    rig = real_rig(setting.base, setting.adapters, max_num_batched_tokens=9)
    for name, oracle in setting.oracles.items():
        assert ask(rig, name, ids(31), name) == [oracle.generate(ids(31), NUM_TOKENS)]


def test_longrope_counts_virtual_tokens_and_has_their_keys_in_both_regimes(tmp_path: Path) -> None:
    """20 virtual tokens: the switch at 48 positions comes after 28 tokens, 5 of them are the answer's."""
    setting = make_setting("phi3-longrope", tmp_path, ("prompt", "prefix"))
    prompt_prefix, given = setting.adapters["prompt"].prefix, setting.adapters["prefix"].prefix
    assert prompt_prefix is not None
    assert given is not None
    assert (len(prompt_prefix.pages), len(given.pages)) == (2, 1)
    rig = real_rig(setting.base, setting.adapters)
    for name, length in (("prompt", 23), ("prompt", 40), ("prefix", 38)):
        found = ask(rig, f"{name}{length}", ids(length), name)
        assert found == [setting.oracles[name].greedy(ids(length), NUM_TOKENS)]


def test_rows_of_others_keep_their_bits(setting: Setting) -> None:
    """Steps of the same rows, once with prefixes behind some of them and once without: the other rows do not notice."""
    others: list[tuple[str, ...]] = [(), ("lora",), ("ia3",)]
    rows: list[dict[int, list[torch.Tensor]]] = []
    tokens = {}
    for has_prefixes in (True, False):
        rig = real_rig(setting.base, setting.adapters, max_num_batched_tokens=64)
        requests = [make_request(f"o{i}", ids(9), *who, max_tokens=6, ignore_eos=True) for i, who in enumerate(others)]
        for name in CASES:
            versions = (name,) if has_prefixes else ()
            requests.append(make_request(name, ids(14), *versions, max_tokens=6, ignore_eos=True))
        tokens[has_prefixes] = rig.run(*requests)
        rows.append(rig.runner.rows)
    for seq_id in range(len(others)):
        assert torch.equal(torch.stack(rows[0][seq_id]), torch.stack(rows[1][seq_id]))
    for seq_id, name in enumerate(CASES, start=len(others)):
        assert not torch.equal(rows[0][seq_id][0], rows[1][seq_id][0])
        assert tokens[True][name] == [setting.oracles[name].generate(ids(14), 6)]


def test_strength_0_is_the_base_to_the_bit(setting: Setting) -> None:
    prompt = ids(21)
    rows = []
    for binding in (Binding(), Binding((BindingPart("cartridge", 0.0, 0.0),))):
        rig = real_rig(setting.base, setting.adapters)
        ask(rig, "r", prompt, binding=binding)
        rows.append(torch.stack(rig.runner.rows[0]))
    assert torch.equal(*rows)


def test_blocks_are_copied_once_and_shared_by_later_requests(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """37 virtual tokens: two full blocks are shared at once, the third with 11 tokens of a prompt that has them."""
    rig = real_rig(setting.base, setting.adapters)
    tables = rig.runner.runner.prefixes
    assert tables is not None
    copied: list[int] = []
    copy = tables.copy

    def counting(slot: int, pool: torch.Tensor, blocks: list[int], first: int, regime: int, start: int) -> None:
        copied.append(first)
        copy(slot, pool, blocks, first, regime, start)

    monkeypatch.setattr(tables, "copy", counting)
    prompt, other = ids(30), ids(30, seed=1)
    first = ask(rig, "a", prompt, "cartridge")
    assert copied == [0]
    assert ask(rig, "b", prompt, "cartridge") == first  # full blocks of prefix and prompt: nothing to copy
    assert ask(rig, "c", other, "cartridge") == [setting.oracles["cartridge"].generate(other, NUM_TOKENS)]
    assert copied == [0, 2]  # its prompt begins in the third block
    # Another adapter of the same length, another tenant, the base: nobody finds these blocks.
    ask(rig, "d", prompt, "cartridge", tenant="other")
    assert copied == [0, 2, 0]
    cached = []
    for key, versions in (("e", ()), ("f", ("cartridge",))):
        rig.engine.add(make_request(key, prompt, *versions, max_tokens=1), 0.0)
        while rig.engine.open_ids:
            cached += [output.num_cached_tokens for output in rig.engine.step().outputs]
    assert cached == [0, 64 - 37]


def test_usage_and_prompt_logprobs_know_nothing_of_virtual_tokens(setting: Setting) -> None:
    prompt = ids(70)  # more rows than one step takes
    rig = real_rig(setting.base, setting.adapters)
    for request_id in ("cold", "warm"):
        rig.engine.add(make_request(request_id, prompt, "prompt", max_tokens=0, prompt_logprobs=2), 0.0)
        outputs = []
        while rig.engine.open_ids:
            outputs += rig.engine.step().outputs
            rig.engine.check_integrity()
        told = outputs[0].prompt_logprobs
        assert told is not None
        assert (len(told), told[0], outputs[0].num_prompt_tokens) == (70, None, 70)
        logprobs = torch.log_softmax(setting.oracles["prompt"].logits(prompt), dim=-1)
        for position, entry in enumerate(told[1:], start=1):
            assert entry is not None
            assert entry.token_id == prompt[position]
            assert entry.logprob == pytest.approx(float(logprobs[position - 1, prompt[position]]), abs=1e-4)


def test_preempted_evicted_and_sampled_in_parallel(setting: Setting) -> None:
    """Two slots and few blocks for five adapters: all are thrown out again and again, and answer the same."""
    rig = real_rig(setting.base, setting.adapters, num_blocks=14, num_slots=2, max_num_batched_tokens=20)
    names = ("cartridge", "prompt", "lora", "cpt", "p-tuning")
    requests = [
        make_request(f"{name}{turn}", ids(20 + turn, turn), name, max_tokens=30, n=2, ignore_eos=True)
        for turn in range(2)
        for name in names
    ]
    tokens = rig.run(*requests)
    assert rig.num_preempted > 0
    for request in requests:
        name = request.binding.versions[0]
        one, other = tokens[request.request_id]
        assert one == other
        if name in setting.oracles:
            assert one == setting.oracles[name].generate(request.prompt_ids, 30)
    assert rig.engine.num_blocks_used == 0


def test_graphs_decode_behind_a_prefix(setting: Setting) -> None:
    """Rows with a prefix are rows of the base: decode steps take the graph without adapters."""
    prompt = ids(17)
    rig = real_rig(setting.base, setting.adapters, max_num_seqs=4, has_graphs=True)
    for name in ("cartridge", "prompt"):
        assert ask(rig, name, prompt, name) == [setting.oracles[name].generate(prompt, NUM_TOKENS)]
        one = ask(rig, f"{name}-one", prompt[:1], name)  # its first step is a graph's already
        assert one == [setting.oracles[name].generate(prompt[:1], NUM_TOKENS)]


@pytest.mark.parametrize("is_told", [True, False])
def test_refused_by_type(setting: Setting, is_told: bool) -> None:
    """By the same words at the door, where the binding tells of the prefix, and when the adapter is there; nothing is
    left behind."""
    length = num_tokens("cartridge") if is_told else 0
    strengths = "allowed: strength 0 or 1"

    def part(first: float = 1.0, last: float = 1.0, start: int = 0) -> BindingPart:
        return BindingPart("cartridge", first, last, start, num_prefix_tokens=length)

    rig = real_rig(setting.base, setting.adapters, num_blocks=8)
    room = 8 * 16 - num_tokens("cartridge")
    cases: list[tuple[Binding, int, type[Exception], str]] = [
        (Binding((part(0.5, 0.5),)), 4, InvalidRequest, strengths),
        (Binding((part(0.0, 1.0),)), 4, InvalidRequest, strengths),
        (Binding((part(-1.0, -1.0),)), 4, InvalidRequest, strengths),
        (Binding((part(start=3),)), 4, InvalidRequest, "before the whole prompt"),
        (Binding((part(),)), room - 9, ContextLengthExceeded, "of which virtual tokens take 37"),
    ]
    for index, (binding, max_tokens, error, text) in enumerate(cases):
        with pytest.raises(error, match=text):
            ask(rig, f"bad{index}", ids(10), binding=binding, max_tokens=max_tokens)
        rig.engine.check_integrity()
    assert len(ask(rig, "good", ids(10), binding=Binding((part(),)), max_tokens=room - 10)[0]) == room - 10
    assert rig.engine.num_blocks_used == 0
