"""Residual modules and whole-weight differences over HTTP: uploaded, proven, answered beside others, evicted, again."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.config import MIB, EngineConfig, ServeConfig
from deltaserve.model.base import load_base
from deltaserve.remote import RemoteServer
from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.formats import read_adapter
from deltatest.apart_adapters import changed_model, hooked_logits, make_bottleneck, make_dense
from deltatest.live_runtime import serve_runtime
from deltatest.of_kind import all_of
from deltatest.peft_adapters import base_logits
from deltatest.tiny_models import save_random, tiny_config
from deltatest.tokenizers import byte_level

BASE, PROMPT, LENGTH = "tiny-base", "The quick brown fox", 8
NAMES = ("houlsby", "delta", "signs")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("apart")
    tokenizer = byte_level()
    folder = save_random(tiny_config("llama", vocab_size=tokenizer.vocab_size), root / BASE)
    tokenizer._hf.save_pretrained(folder)
    spec = load_base(folder, dtype=torch.float32, cache_dir=root / "cache").spec
    found = {
        "base": folder,
        "houlsby": make_bottleneck(spec, root / "houlsby", ("attn_out", "mlp_out"), activation="gelu"),
    }
    return found | {form: make_dense(spec, root / form, form) for form in NAMES[1:]}


@pytest.fixture(scope="module")
def url(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two slots for three adapters."""
    engine = EngineConfig(max_model_len=128, max_num_seqs=8, kv_cache_bytes=8 * MIB, adapter_slots=2)
    store = tmp_path_factory.mktemp("store") / "store"
    config = ServeConfig(
        model=str(folders["base"]), store=store, port=0, dtype="float32", drain_seconds=5, engine=engine
    )
    with serve_runtime(config) as server:
        for name in NAMES:
            told = RemoteServer(server.url).upload(folders[name], name)
            assert told["kinds"] == ["bottleneck" if name == "houlsby" else "dense"]
        yield server.url


def expected(folders: dict[str, Path], name: str) -> list[int]:
    """Greedy tokens of transformers' model, changed."""
    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32).eval()
    logits: Callable[[list[int]], Tensor] = lambda ids: base_logits(model, ids)  # noqa: E731
    if name != BASE:
        spec = load_base(folders["base"], dtype=torch.float32, cache_dir=folders["base"].parent / "cache").spec
        deltas = read_adapter(folders[name], spec).deltas
        if name == "houlsby":
            modules = all_of(BottleneckDelta, deltas)
            logits = lambda ids: hooked_logits(model, "llama", modules, ids)  # noqa: E731
        else:
            changed = changed_model(model, deltas, spec)
            logits = lambda ids: base_logits(changed, ids)  # noqa: E731
    ids = byte_level().encode(PROMPT)
    for _ in range(LENGTH):
        ids = [*ids, int(logits(ids)[-1].argmax())]
    return ids[-LENGTH:]


def test_uploaded_adapters_answer_as_the_changed_model_through_evictions(url: str, folders: dict[str, Path]) -> None:
    wanted = {name: expected(folders, name) for name in (BASE, *NAMES)}
    assert len({tuple(ids) for ids in wanted.values()}) == len(wanted)

    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as client:

        def ask(name: str) -> tuple[str, list[int]]:
            extra = {"ignore_eos": True, "return_token_ids": True}
            answer = client.completions.create(
                model=name, prompt=PROMPT, temperature=0, max_tokens=LENGTH, extra_body=extra
            )
            return name, answer.choices[0].token_ids  # type: ignore[attr-defined]

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for name, ids in pool.map(ask, [BASE, *NAMES] * 4):
                assert ids == wanted[name], name
