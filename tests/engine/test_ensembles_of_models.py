"""Ensembles of real adapters equal the offline mix: each member's logits by teacher forcing through weights changed by
hand (or PEFT, for virtual tokens), mixed afterwards; in company, under preemption and eviction, and with graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.core import Binding, Ensemble, GenerationRequest, Member, Mix
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.engine.live_request import make_sequences
from deltaserve.engine.sampler import Sampler
from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import use_backend
from deltatest.engine_fakes import request
from deltatest.mixed_batch import prompts
from deltatest.peft_adapters import make_gates, make_peft_ia3, make_peft_lora, make_sparse
from deltatest.prefix_adapters import Oracle, make_prefix
from deltatest.real_engine import RealRig, fold_folder, real_rig
from deltatest.sum_of_deltas import Parts, binding_of, logits_of, summed
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

NUM_TOKENS = 12
MEMBERS: dict[str, Parts] = {
    "base": (),
    "lora": (("lora", 1.0),),
    "ia3": (("ia3", 1.0),),
    "sum": (("lora", (0.3, 1.0)), ("sparse", 0.7), ("gates", -0.5)),
    "cartridge": (("cartridge", 1.0),),  # 37 virtual tokens
}
ENSEMBLES: dict[str, tuple[Mix, dict[str, float]]] = {
    "mean": (Mix.LOGITS, {"lora": 0.5, "ia3": 0.5}),
    "contrast": (Mix.LOGITS, {"lora": 1.6, "base": -0.6}),
    "every kind": (Mix.LOGITS, {"cartridge": 0.4, "sum": 0.3, "base": 0.1, "ia3": 0.2}),
    "mixture": (Mix.PROBABILITIES, {"sum": 2.0, "cartridge": 1.0, "lora": 0.5}),
}


@pytest.fixture(scope="module", autouse=True)
def _reference_operators() -> Iterator[None]:
    """The C++ operators want lists without empty items, which graphs have."""
    before = use_backend("reference")
    yield
    use_backend(before)


@dataclass
class Setting:
    base: BaseModel
    adapters: dict[str, FoldedAdapter]
    oracles: dict[str, Callable[[Sequence[int]], Tensor]]
    requests: dict[str, GenerationRequest]

    def rig(self, **options: Any) -> RealRig:
        return real_rig(self.base, self.adapters, **options)

    def rows(self, name: str, tokens: Sequence[int]) -> Tensor:
        """Float64 [NUM_TOKENS, vocab]: the offline mix before each of the answer's ``tokens``."""
        mix, weights = ENSEMBLES[name]
        prompt = self.requests[name].prompt_ids
        each = torch.stack([self.oracles[member]([*prompt, *tokens])[len(prompt) - 1 : -1] for member in weights])
        shares = torch.tensor(list(weights.values()), dtype=torch.float64)[:, None, None]
        if mix is Mix.LOGITS:
            return (shares * each.double()).sum(dim=0)
        return (shares / shares.sum() * each.double().softmax(dim=-1)).sum(dim=0).log()


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("ensembles")
    folder = build_tiny_model("llama", root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders: dict[str, Path] = {
        "lora": make_peft_lora(model, root / "lora", rank=4, std=0.2, seed=1),
        "ia3": make_peft_ia3(model, root / "ia3", std=0.3, seed=2),
        "sparse": make_sparse(base.spec, root / "sparse", seed=3),
        "gates": make_gates(base.spec, root / "gates", seed=4),
        "cartridge": make_prefix(model, root / "cartridge", "cartridge", seed=5),
    }
    models = {name: summed(model, base, folders, parts) for name, parts in MEMBERS.items() if name != "cartridge"}

    def forced(changed: torch.nn.Module) -> Callable[[Sequence[int]], Tensor]:
        return lambda ids: logits_of(changed, ids)

    virtual = Oracle(model, folders["cartridge"])
    oracles = {
        **{name: forced(changed) for name, changed in models.items()},
        "cartridge": lambda i: virtual.logits(list(i)),
    }
    requests = {}
    for (name, (mix, weights)), ids in zip(ENSEMBLES.items(), prompts([19, 7, 33, 2], VOCAB_SIZE), strict=True):
        members = tuple(Member(binding_of(MEMBERS[member]), weight) for member, weight in weights.items())
        plain = request(name, ids, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3)
        requests[name] = replace(plain, ensemble=Ensemble(members, mix))
    return Setting(base, {name: fold_folder(path, base) for name, path in folders.items()}, oracles, requests)


def plain(name: str, binding: Binding, ids: Sequence[int]) -> GenerationRequest:
    return request(name, ids, binding=binding, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def answers(setting: Setting) -> dict[str, list[int]]:
    """All ensembles and a request of every member alone, in one batch, prompts in chunks."""
    alone = [plain(f"only {name}", binding_of(parts), [5, 6, 7, 8]) for name, parts in MEMBERS.items()]
    rig = setting.rig(max_num_batched_tokens=40)
    tokens = rig.run(*setting.requests.values(), *alone)
    assert rig.runner.max_step_seqs == 2 + 2 + 4 + 3 + len(MEMBERS)
    return {name: choices[0] for name, choices in tokens.items()}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_greedy_equals_the_offline_mix(setting: Setting, answers: dict[str, list[int]], name: str) -> None:
    rows = setting.rows(name, answers[name])
    assert answers[name] == rows.argmax(dim=-1).tolist()
    members = ENSEMBLES[name][1]
    prompt = setting.requests[name].prompt_ids
    each = [setting.oracles[member]([*prompt, *answers[name]])[len(prompt) - 1 : -1].argmax(-1) for member in members]
    assert all(found.tolist() != answers[name] for found in each), "one member alone says this: it proves nothing"


@pytest.mark.parametrize("name", ENSEMBLES)
def test_scores_and_samples_equal_the_offline_mix(setting: Setting, name: str) -> None:
    """The offline rows go through a sampler of their own, with the same seed."""
    asked = setting.requests[name]
    sampling = replace(asked.sampling, temperature=1.3, top_p=0.95, seed=11, repetition_penalty=1.1)
    asked = replace(asked, sampling=sampling)
    rig = setting.rig()
    rig.engine.add(asked, 0.0)
    deltas = []
    while rig.engine.open_ids:
        deltas += [delta for output in rig.engine.step().outputs for delta in output.deltas]
    tokens = [token for delta in deltas for token in delta.token_ids]
    rows = setting.rows(name, tokens)
    scores = rows.log_softmax(dim=-1)
    for at, delta in enumerate(deltas):
        (entry,) = delta.logprobs
        assert entry.logprob == pytest.approx(float(scores[at, entry.token_id]), abs=2e-4)
    if asked.ensemble is not None and asked.ensemble.mix is Mix.PROBABILITIES:
        return  # a penalty looks at where zero is, which a probability does not tell
    (lead,) = make_sequences(replace(asked, ensemble=None), 0.0, iter(range(1)))
    sampler = Sampler(VOCAB_SIZE)
    for at, token in enumerate(tokens):
        assert sampler.sample(rows[at : at + 1].float(), [lead]) == [token]
        lead.token_ids.append(token)


def test_rows_beside_an_ensemble_keep_their_bits(setting: Setting) -> None:
    """The same rows, once as an ensemble and once as requests of their own that say what it said."""
    others = [plain(f"o{i}", binding_of(MEMBERS[name]), [9, 8, 7, i]) for i, name in enumerate(("base", "lora", "sum"))]
    asked = setting.requests["every kind"]
    together = setting.rig()
    said = together.run(*others, asked)
    members = [plain(name, binding_of(MEMBERS[name]), asked.prompt_ids) for name in ENSEMBLES["every kind"][1]]
    apart = setting.rig()
    assert apart.run(*others, *members).items() >= {each.request_id: said[each.request_id] for each in others}.items()
    for seq_id in range(len(others)):
        assert torch.equal(torch.stack(together.runner.rows[seq_id]), torch.stack(apart.runner.rows[seq_id]))
    for seq_id in range(len(others), len(others) + len(members)):  # until what was said differs
        assert torch.equal(together.runner.rows[seq_id][0], apart.runner.rows[seq_id][0])


def test_a_member_alone_is_the_plain_request_to_the_bit(setting: Setting) -> None:
    for name in ("base", "sum", "cartridge"):
        asked = plain(name, binding_of(MEMBERS[name]), prompts([21], VOCAB_SIZE)[0])
        asked = replace(asked, sampling=replace(asked.sampling, logprobs=5))
        told = []
        for ensemble in (None, Ensemble((Member(asked.binding, 1.0),))):
            rig = setting.rig()
            rig.engine.add(replace(asked, ensemble=ensemble), 0.0)
            outputs = []
            while rig.engine.open_ids:
                outputs += rig.engine.step().outputs
            told.append(outputs)
        assert told[0] == told[1]


def test_preemption_eviction_and_graphs_change_no_answer(setting: Setting, answers: dict[str, list[int]]) -> None:
    """Few blocks, and slots for the adapters of the largest ensemble alone; a decode step of adapters that graphs know
    is replayed."""
    rig = setting.rig(num_blocks=17, num_slots=5, max_num_seqs=6, max_num_batched_tokens=24, has_graphs=True)
    graphs = rig.runner.runner.graphs
    assert graphs is not None
    replayed: list[int] = []
    original = graphs.run
    graphs.run = lambda batch: replayed.append(len(batch)) or original(batch)  # type: ignore[method-assign,func-returns-value]
    # They are older, and grow: the ensemble behind them has to go.
    long = [request(f"long{i}", [i, 2, 3], "lora", max_tokens=60, ignore_eos=True) for i in range(2)]
    names = ("every kind", "contrast", "mixture", "mean")
    tokens = rig.run(*long, *[setting.requests[name] for name in names])
    assert {name: tokens[name] for name in names} == {name: [answers[name]] for name in names}
    assert rig.num_preempted >= 4
    assert any(count > 1 for count in replayed)
    assert rig.engine.num_blocks_used == 0
