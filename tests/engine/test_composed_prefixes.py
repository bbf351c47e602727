"""Virtual tokens of several adapters, and of one under the terms of others: transformers' own cache says what is right,
alone and in company, from the prefix cache, after preemption and eviction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.core import Binding, BindingPart, GenerationRequest
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.engine import prefix_fill
from deltaserve.engine.batch import PrefixFill, PrefixPart
from deltaserve.engine.prefix_seat import arrange
from deltaserve.errors import ContextLengthExceeded, InvalidRequest
from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import PrefixEntry, PrefixTables
from deltatest.apart_adapters import make_bottleneck
from deltatest.composed_judge import ComposedJudge
from deltatest.engine_fakes import request as make_request
from deltatest.peft_adapters import make_peft_ia3, make_peft_ln_tuning, make_peft_lora, make_sparse
from deltatest.prefix_adapters import make_prefix, num_tokens
from deltatest.real_engine import RealRig, fold_folder, real_rig
from deltatest.rotation_kinds import make_rotation
from deltatest.sum_of_deltas import Parts, binding_of
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)

NUM_TOKENS = 8
PREFIXES = ("prefix", "cartridge", "prompt", "multitask", "cpt")
COMPOSED: dict[str, Parts] = {
    "given and low-rank": (("cartridge", 1.0), ("lora", 0.8)),
    "the other way round": (("lora", 0.8), ("cartridge", 1.0)),
    "given and scales": (("prefix", 1.0), ("ia3", 0.5), ("norms", 0.7)),
    "two given": (("prefix", 1.0), ("cartridge", 1.0)),
    "embeddings and low-rank": (("prompt", 1.0), ("lora", 0.8)),
    "embeddings and a profile": (("lora", (0.0, 1.0)), ("prompt", 1.0), ("sparse", (1.0, -0.5))),
    "embeddings under a rotation": (("rotation", 1.0), ("cpt", 1.0)),
    "embeddings under modules": (("multitask", 1.0), ("modules", 0.6)),
    "two of embeddings": (("prompt", 1.0), ("cpt", 1.0)),
    "two of embeddings, other way": (("cpt", 1.0), ("prompt", 1.0)),
    "given before embeddings": (("prefix", 1.0), ("prompt", 1.0)),
    "embeddings before given": (("prompt", 1.0), ("prefix", 1.0)),
    "five, all kinds": (
        ("cpt", 1.0),
        ("prefix", 1.0),
        ("lora", 0.5),
        ("prompt", 1.0),
        ("cartridge", 1.0),
        ("multitask", 1.0),
        ("sparse", 0.4),
        ("norms", 0.5),
    ),
    "one at strength 0": (("cartridge", 0.0), ("prompt", 1.0), ("lora", 1.0)),
    "terms at strength 0": (("prompt", 1.0), ("lora", 0.0), ("norms", 0.0)),
}


@dataclass
class Setting:
    base: BaseModel
    model: Any
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]
    judges: dict[Parts, ComposedJudge] = field(default_factory=dict)

    def judge(self, parts: Parts) -> ComposedJudge:
        if parts not in self.judges:
            self.judges[parts] = ComposedJudge(self.model, self.base, self.folders, parts)
        return self.judges[parts]

    def rig(self, **options: Any) -> RealRig:
        return real_rig(self.base, self.adapters, **options)


def make_setting(architecture: str, root: Path, *names: str) -> Setting:
    folder = build_tiny_model(architecture, root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "digests")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    makers: dict[str, Callable[[Path], Path]] = {
        "lora": lambda path: make_peft_lora(model, path, std=0.2, rank=3, targets=("o_proj", "down_proj")),
        "sparse": lambda path: make_sparse(base.spec, path, seed=2),
        "ia3": lambda path: make_peft_ia3(model, path, std=0.1, seed=3),
        "norms": lambda path: make_peft_ln_tuning(model, path, std=0.1, seed=4),
        "rotation": lambda path: make_rotation(model, path, "oft", seed=5),
        "modules": lambda path: make_bottleneck(base.spec, path, parallel=True, seed=6),
    }
    folders = {}
    for name in names or (*PREFIXES, *makers):
        seed = PREFIXES.index(name) if name in PREFIXES else 0
        make = makers.get(name, partial(_virtual, model, name, seed))
        folders[name] = make(root / name)
    return Setting(base, model, folders, {name: fold_folder(path, base) for name, path in folders.items()})


def _virtual(model: Any, name: str, seed: int, folder: Path) -> Path:
    return make_prefix(model, folder, name, seed=seed)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting("llama", tmp_path_factory.mktemp("composed"))


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(name: str, prompt: Sequence[int], parts: Parts, **options: Any) -> GenerationRequest:
    options = {"max_tokens": NUM_TOKENS, "ignore_eos": True, **options}
    return make_request(name, prompt, binding=binding_of(parts), **options)


def rows_of(rig: RealRig, *requests: GenerationRequest) -> dict[str, tuple[list[int], Tensor]]:
    first = 1 + max(rig.runner.rows, default=-1)
    tokens = rig.run(*requests)
    return {
        request.request_id: (tokens[request.request_id][0], torch.stack(rig.runner.rows[first + index]))
        for index, request in enumerate(requests)
    }


def prompt_of(index: int) -> list[int]:
    """Lengths around the borders of blocks; one of a single token."""
    return ids((1, 9, 16, 33, 28)[index % 5], index)


@pytest.fixture(scope="module")
def mixed(setting: Setting) -> dict[str, tuple[list[int], Tensor]]:
    """All compositions, their prefixes alone, and the base in one batch; prompts come in several chunks."""
    rig = setting.rig(max_num_batched_tokens=90)
    # How many adapters a step may place goes by the clock: all are placed before, so that all rows meet in one step.
    versions = sorted({version for parts in COMPOSED.values() for version, *_ in parts} | set(PREFIXES))
    rig.run(*(ask(f"first-{name}", [5], ((name, 1.0),), max_tokens=1) for name in versions))
    requests = [ask(name, prompt_of(index), parts) for index, (name, parts) in enumerate(COMPOSED.items())]
    others = [ask(name, ids(20), ((name, 1.0),)) for name in PREFIXES]
    found = rows_of(rig, *requests, *others, ask("base", ids(20), ()))
    assert rig.runner.max_step_seqs == len(found)
    return found


@pytest.mark.parametrize("name", COMPOSED)
def test_each_is_what_transformers_makes_of_it(
    setting: Setting, mixed: dict[str, tuple[list[int], Tensor]], name: str
) -> None:
    prompt, judge = prompt_of(list(COMPOSED).index(name)), setting.judge(COMPOSED[name])
    tokens, rows = mixed[name]
    wanted = judge.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    assert float((rows - wanted).abs().max()) < 1e-4
    assert tokens == wanted.argmax(dim=-1).tolist()
    alone, alone_rows = rows_of(setting.rig(max_num_batched_tokens=7), ask(name, prompt, COMPOSED[name]))[name]
    assert alone == tokens
    assert float((alone_rows - rows).abs().max()) < 1e-4
    # Every part has a say: without it the judge says something else.
    for left_out, strength in COMPOSED[name]:
        if strength == 0.0:
            continue
        rest = setting.judge(tuple(part for part in COMPOSED[name] if part[0] != left_out))
        assert float((rest.logits(prompt)[-1] - wanted[0]).abs().max()) > 1e-2, left_out


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "phi3-longrope"])
def test_windows_soft_caps_and_ropes_that_change(architecture: str, tmp_path: Path) -> None:
    """Windows of 24 slide over all virtual tokens; the switch of frequencies at 48 positions comes early behind 27."""
    setting = make_setting(architecture, tmp_path, "cpt", "prompt", "cartridge", "lora")
    virtual: list[Parts] = [(("cpt", 1.0), ("prompt", 1.0)), (("prompt", 1.0), ("lora", 0.8))]
    if architecture != "phi3-longrope":  # there transformers' cache would hold keys of both regimes
        virtual.append((("cartridge", 1.0), ("cpt", 1.0), ("lora", 0.5)))
    rig = setting.rig(max_num_batched_tokens=19)
    for length in (17, 31):
        found = rig.run(*(ask(str(index), ids(length), parts) for index, parts in enumerate(virtual)))
        for index, parts in enumerate(virtual):
            judge, tokens = setting.judge(parts), found[str(index)][0]
            said = [[*ids(length), *tokens[:count]] for count in range(NUM_TOKENS)]  # each length has its frequencies
            assert tokens == [int(judge.logits(before)[-1].argmax()) for before in said], parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_as_transformers_does(setting: Setting, dtype: torch.dtype) -> None:
    """Against fp32, the engine on average is no further away than transformers' model in that dtype."""
    base = load_base(setting.base.folder, dtype=dtype, cache_dir=setting.base.folder / "digests")
    chosen = ("given and low-rank", "embeddings and low-rank", "two of embeddings", "five, all kinds")
    names = {name for case in chosen for name, _ in COMPOSED[case]}
    rig = real_rig(base, {name: fold_folder(setting.folders[name], base) for name in names})
    prompt = ids(28)
    rows = rows_of(rig, *(ask(case, prompt, COMPOSED[case], max_tokens=1) for case in chosen))
    ours, theirs = [], []
    for case in chosen:
        wanted = setting.judge(COMPOSED[case]).logits(prompt)[-1]
        narrow = ComposedJudge(setting.model, setting.base, setting.folders, COMPOSED[case]).to(dtype)
        ours.append(float((rows[case][1][0] - wanted).abs().max()))
        theirs.append(float((narrow.logits(prompt)[-1] - wanted).abs().max()))
    assert sum(ours) < 2 * sum(theirs), (ours, theirs)


def test_order_matters_where_virtual_tokens_read_each_other(setting: Setting) -> None:
    """Given keys have no position, so that a token finds the same in either order; embeddings read what is before."""
    rig, prompt = setting.rig(), ids(12)

    def first_row(parts: Parts) -> Tensor:
        return rows_of(rig, ask("r", prompt, parts))["r"][1][0]

    for name in ("two of embeddings", "given before embeddings"):
        parts = COMPOSED[name]
        assert float((first_row(parts) - first_row(parts[::-1])).abs().max()) > 1e-2
    parts = COMPOSED["two given"]
    assert float((first_row(parts) - first_row(parts[::-1])).abs().max()) < 1e-5
    parts = COMPOSED["given and low-rank"]
    assert torch.equal(first_row(parts), first_row(parts[::-1]))


def test_others_in_the_step_do_not_feel_it_to_the_bit(setting: Setting) -> None:
    """The same steps with the compositions' rows and with rows of the base in their places."""
    found = []
    for is_composed in (True, False):
        rig = setting.rig(max_num_batched_tokens=64)
        requests = [ask("base", ids(9), ()), ask("lora", ids(9), (("lora", 1.0),))]
        requests.append(ask("prompt", ids(9), (("prompt", 1.0),)))
        for index, (name, parts) in enumerate(COMPOSED.items()):
            requests.append(ask(name, ids(14, index), parts if is_composed else ()))
        found.append(rows_of(rig, *requests))
    for name in ("base", "lora", "prompt"):
        assert torch.equal(found[0][name][1], found[1][name][1])


def test_strength_0_leaves_no_trace_to_the_bit(setting: Setting) -> None:
    prompt = ids(21)
    for bare, more in (
        ((("prompt", 1.0),), (("prompt", 1.0), ("lora", 0.0), ("cartridge", 0.0), ("modules", 0.0))),
        ((("cartridge", 1.0),), (("prompt", 0.0), ("cartridge", 1.0), ("sparse", 0.0))),
        ((), (("prompt", 0.0), ("cartridge", 0.0), ("lora", 0.0))),
    ):
        rows = [rows_of(setting.rig(), ask("r", prompt, parts))["r"][1] for parts in (bare, more)]
        assert torch.equal(*rows)


def cached(rig: RealRig, prompt: Sequence[int], parts: Parts, **options: Any) -> tuple[list[int], int]:
    rig.engine.add(ask("r", prompt, parts, **options), rig.engine.clock())
    tokens, count = [], 0
    while rig.engine.open_ids:
        for output in rig.engine.step().outputs:
            count = output.num_cached_tokens
            tokens += [token for delta in output.deltas for token in delta.token_ids]
        rig.engine.check_integrity()
    return tokens, count


def test_compositions_that_share_a_part_share_no_wrong_block(setting: Setting) -> None:
    """One engine, one prompt: each composition finds its own blocks again, and nobody else's."""
    rig, prompt = setting.rig(), ids(40)
    pairs: list[Parts] = [
        (("cartridge", 1.0), ("lora", 0.8)),
        (("lora", 0.8), ("cartridge", 1.0)),
        (("cartridge", 1.0), ("lora", 0.7)),
        (("cartridge", 1.0),),
        (("cartridge", 1.0), ("prefix", 1.0)),
        (("prefix", 1.0), ("cartridge", 1.0)),
        (("prompt", 1.0), ("lora", 0.8)),
        (("prompt", 1.0), ("lora", (0.8, 0.7))),
        (("prompt", 1.0),),
        (("prompt", 1.0), ("cpt", 1.0)),
        (("cpt", 1.0), ("prompt", 1.0)),
        (("prompt", 1.0), ("prefix", 1.0)),
        (("lora", 0.8),),
        (),
    ]
    first = []
    for parts in pairs:
        tokens, count = cached(rig, prompt, parts)
        assert count == 0, parts
        assert tokens == setting.judge(parts).choices(prompt, tokens), parts
        first.append(tokens)
    for parts, tokens in zip(pairs, first, strict=True):
        skipped = sum(num_tokens(name) for name, _ in parts if name in PREFIXES)
        shared = (skipped + len(prompt) - 1) // 16 * 16 - skipped
        assert cached(rig, prompt, parts) == (tokens, shared), parts
    assert cached(rig, prompt, pairs[0], tenant="other") == (first[0], 0)


def test_blocks_found_are_neither_copied_nor_run_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 and 20 virtual tokens, the second set run: a shared first block leaves 11 of them to be run, and a part of the
    prompt; nothing is left once the prompt has them all."""
    rig = setting.rig()
    starts: list[tuple[int, int]] = []
    fill = prefix_fill.passes

    def counting(*args: Any) -> Any:
        for virtual in fill(*args):
            starts.extend((seq.start, seq.stop) for seq in virtual.batch)
            yield virtual

    monkeypatch.setattr("deltaserve.engine.model_runner.passes", counting)
    parts: Parts = (("cpt", 1.0), ("prompt", 1.0))
    cached(rig, ids(30), parts)
    assert starts == [(7, 27)]
    other = ids(30, seed=1)
    tokens, _ = cached(rig, other, parts)
    assert tokens == setting.judge(parts).choices(other, tokens)
    assert starts[1:] == [(16, 27)]
    assert cached(rig, ids(30), parts)[1] > 0
    assert len(starts) == 2


def test_long_prompts_of_embeddings_are_run_in_pieces(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_fill, "MAX_ROWS", 6)
    for name in ("two of embeddings", "embeddings before given", "five, all kinds"):
        found = rows_of(setting.rig(), ask("one", ids(12), COMPOSED[name]), ask("more", ids(5), COMPOSED[name]))
        for tokens, prompt in ((found["one"][0], ids(12)), (found["more"][0], ids(5))):
            assert tokens == setting.judge(COMPOSED[name]).choices(prompt, tokens)


def test_rows_that_are_run_count_against_the_budget(setting: Setting) -> None:
    """20 virtual tokens and chunks of 16: the second sequence starts in the step after, as behind a prompt."""
    rig = setting.rig(max_num_batched_tokens=16)
    for name in ("a", "b"):
        rig.engine.add(ask(name, ids(4), COMPOSED["embeddings and low-rank"]), rig.engine.clock())
    rows = []
    while rig.engine.open_ids:
        stats = rig.engine.step().stats
        rows.append((stats.num_prefill_tokens, stats.num_decode_tokens) if stats else None)
        rig.engine.check_integrity()
    given = [found for found in rows if found]
    assert given[:3] == [(24, 0), (8, 1), (0, 2)]  # the second finds a block of the first


def test_preempted_evicted_and_in_parallel(setting: Setting) -> None:
    """Four slots and few blocks: everything is thrown out again and again, and answers the same, to the bit alone."""
    names = ("given and low-rank", "two given", "embeddings and low-rank", "given before embeddings")
    rig = setting.rig(num_blocks=18, num_slots=4, max_num_batched_tokens=20)
    requests = [
        ask(f"{name}{turn}", ids(20 + turn, turn), COMPOSED[name], max_tokens=24, n=2)
        for turn in range(2)
        for name in names
    ]
    tokens = rig.run(*requests)
    assert rig.num_preempted > 0
    for turn in range(2):
        for name in names:
            one, other = tokens[f"{name}{turn}"]
            assert one == other == setting.judge(COMPOSED[name]).choices(ids(20 + turn, turn), one)
    assert rig.engine.num_blocks_used == 0
    rig = setting.rig(num_slots=2)
    before = rows_of(rig, ask("a", ids(9), COMPOSED["embeddings and low-rank"], cache_salt="1"))["a"][1]
    rows_of(rig, ask("b", ids(9), COMPOSED["two given"]))  # takes both slots
    after = rows_of(rig, ask("c", ids(9), COMPOSED["embeddings and low-rank"], cache_salt="2"))["c"][1]
    assert torch.equal(before, after)


def test_graphs_decode_behind_composed_prefixes(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other operators check the lists that graphs fill.
    monkeypatch.setattr("deltaserve_kernels.backend._default", "reference")
    rig = setting.rig(max_num_seqs=4, has_graphs=True)
    for name in ("two given", "given and low-rank", "embeddings and low-rank", "embeddings under a rotation"):
        for prompt in (ids(17), ids(1)):
            ((tokens,),) = rig.run(ask("r", prompt, COMPOSED[name])).values()
            assert tokens == setting.judge(COMPOSED[name]).choices(prompt, tokens)


def test_all_prefixes_count_against_the_context(setting: Setting) -> None:
    rig = setting.rig(num_blocks=8)
    room = 8 * 16 - num_tokens("cartridge") - num_tokens("prompt")
    for is_told in (True, False):
        parts = tuple(
            BindingPart(name, num_prefix_tokens=num_tokens(name) if is_told else 0) for name in ("cartridge", "prompt")
        )
        for max_tokens, fits in ((room - 10, True), (room - 9, False)):
            entry = make_request("r", ids(10), binding=Binding(parts), max_tokens=max_tokens, ignore_eos=True)
            if fits:
                assert len(rig.run(entry)["r"][0]) == max_tokens
                continue
            with pytest.raises(ContextLengthExceeded, match="of which virtual tokens take 57"):
                rig.run(entry)
            rig.engine.check_integrity()
    with pytest.raises(InvalidRequest, match="stands before the whole prompt"):
        rig.run(make_request("r", ids(3), binding=Binding((BindingPart("lora"), BindingPart("prompt", 1, 1, 2, 20)))))


def test_an_activated_part_begins_behind_the_virtual_tokens(setting: Setting) -> None:
    """Rows before its start are those without it, and their blocks are shared with requests that do not have it."""
    rig, prompt, skipped = setting.rig(), ids(40), num_tokens("prompt")
    lora = setting.adapters["lora"]
    assert lora.kinds == ("lora",)
    begin = 30
    parts = (BindingPart("prompt"), BindingPart("lora", start_position=skipped + begin))
    cached(rig, prompt, (("prompt", 1.0),))
    rig.engine.add(make_request("a", prompt, binding=Binding(parts), max_tokens=1, ignore_eos=True), 0.0)
    outputs = []
    while rig.engine.open_ids:
        outputs += rig.engine.step().outputs
    assert outputs[0].num_cached_tokens == (skipped + begin) // 16 * 16 - skipped
    # By hand: the base's cache up to there, then the summed weights over it.
    base, changed = setting.judge((("prompt", 1.0),)), setting.judge((("lora", 1.0),))
    with torch.no_grad():
        cache = base.model(inputs_embeds=base.prefixes[0].embeddings[None], use_cache=True).past_key_values
        base.model(torch.tensor([prompt[:begin]]), past_key_values=cache, use_cache=True)
        wanted = changed.model(torch.tensor([prompt[begin:]]), past_key_values=cache).logits[0, -1]
    assert float((rig.runner.rows[max(rig.runner.rows)][0] - wanted).abs().max()) < 1e-4


def test_what_is_copied_and_what_is_run() -> None:
    tables = PrefixTables(6)
    tables.set(0, PrefixEntry(torch.zeros(1, 1, 2, 16, 4), 5))
    tables.set(1, PrefixEntry(torch.zeros(1, 1, 2, 16, 4), 7, torch.zeros(7, 8)))
    tables.set(2, PrefixEntry(torch.zeros(1, 2, 2, 16, 4), 20, torch.zeros(20, 8)))

    def arranged(*parts: tuple[int, float, int]) -> list[tuple[int, int, bool]]:
        binding = Binding(tuple(BindingPart(f"v{slot}", at, at, start) for slot, at, start in parts))
        found = arrange(binding, [slot for slot, _, _ in parts], tables)
        return [(part.slot, part.start, part.is_run) for part in found]

    assert arranged((1, 1, 0)) == [(1, 0, False)]
    assert arranged((1, 1, 0), (0, 1, 0)) == [(1, 0, False), (0, 7, False)]
    assert arranged((0, 1, 0), (1, 1, 0), (2, 1, 0)) == [(0, 0, False), (1, 5, True), (2, 12, True)]
    assert arranged((5, 1, 0), (0, 1, 0), (1, 1, 0)) == [(0, 0, False), (1, 5, True)]
    assert arranged((1, 1, 0), (5, 1, 0)) == [(1, 0, True)]
    assert arranged((1, 1, 0), (5, 0, 0)) == [(1, 0, False)]
    assert arranged((1, 1, 0), (5, 1, 7)) == [(1, 0, False)]  # begins behind it
    assert arranged((1, 1, 0), (5, 1, 6)) == [(1, 0, True)]
    assert arranged((0, 0, 0), (2, 1, 0)) == [(2, 0, False)]
    assert arranged((5, 1, 0)) == []


def test_rows_to_run_are_those_behind_shared_blocks() -> None:
    parts = (PrefixPart(0, 0, 10), PrefixPart(1, 10, 30, is_run=True), PrefixPart(2, 40, 5), PrefixPart(3, 45, 9, True))
    assert [PrefixFill(parts, first).num_rows for first in range(5)] == [39, 33, 17, 6, 0]
