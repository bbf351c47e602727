"""Trained rows and blocks through the engine: with decode graphs, under preemption, and as adapters come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import use_backend
from deltatest.block_adapters import make_blocks
from deltatest.engine_fakes import request as make_request
from deltatest.peft_adapters import make_peft_lora
from deltatest.real_engine import RealRig, fold_folder, real_rig
from deltatest.tiny_models import build_tiny_model
from deltatest.vocabulary_adapters import TOKENS, make_vocabulary_adapter

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _reference_operators() -> Iterator[None]:
    """The C++ operators want lists without empty items, which graphs have."""
    before = use_backend("reference")
    yield
    use_backend(before)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, dict[str, FoldedAdapter]]:
    root = tmp_path_factory.mktemp("rows")
    folder = build_tiny_model("llama", root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder)
    folders = {
        "tokens": make_vocabulary_adapter("tokens-alone", model, root / "tokens", target="q_proj", norm="norm"),
        "low-rank": make_vocabulary_adapter("lora-both", model, root / "low-rank", target="q_proj", norm="norm"),
        "s2ft": make_blocks("s2ft", base.spec, root / "s2ft"),
        "lora": make_peft_lora(model, root / "lora", rank=4, std=0.1),
    }
    return base, {name: fold_folder(path, base) for name, path in folders.items()}


def run(rig: RealRig, names: dict[int, str | None], num_tokens: int) -> dict[str, list[list[int]]]:
    """Requests by number: the number makes the prompt."""
    requests = [
        make_request(
            f"r{i}", [*TOKENS, *[7 + i] * (3 * i)], *([name] if name else []), max_tokens=num_tokens, ignore_eos=True
        )
        for i, name in names.items()
    ]
    return rig.run(*requests)


def test_graphs_preemption_and_eviction_change_no_answer(setting: tuple[BaseModel, dict[str, FoldedAdapter]]) -> None:
    base, adapters = setting
    names = dict(enumerate([None, *adapters, None, "tokens"]))
    rig = real_rig(base, adapters)
    wanted = {key: tokens for i in names for key, tokens in run(rig, {i: names[i]}, 12).items()}
    assert len({str(tokens) for tokens in wanted.values()}) > 4
    rig = real_rig(base, adapters, num_blocks=6, num_slots=2, max_num_seqs=4, has_graphs=True)
    assert run(rig, names, 12) == wanted
    assert rig.num_preempted > 0


def test_only_steps_without_such_rows_are_replayed(setting: tuple[BaseModel, dict[str, FoldedAdapter]]) -> None:
    base, adapters = setting
    rig = real_rig(base, adapters, max_num_seqs=4, has_graphs=True)
    graphs = rig.runner.runner.graphs
    assert graphs is not None
    replayed: list[int] = []
    plain = graphs.run
    graphs.run = lambda batch: replayed.append(len(batch)) or plain(batch)  # type: ignore[method-assign,func-returns-value]
    run(rig, dict(enumerate(["tokens", "s2ft", "low-rank"])), 4)
    assert not replayed
    run(rig, {0: None, 1: "lora"}, 4)
    assert replayed, "they are loaded still, and no row of the step has them"
