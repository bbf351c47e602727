"""Every architecture of the suite computes what transformers computes: logits, and greedy tokens of ``generate()``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaserve.model.base import BaseModel, load_base
from deltatest.paged_driver import PagedDriver, Running
from deltatest.tiny_models import ARCHITECTURES, VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

# Longer and shorter than the windows (24) and than longrope's switch (48, which the second crosses while decoding).
PROMPT_LENGTHS = (5, 40, 61, 17)
NUM_TOKENS = 64


@dataclass
class Pair:
    base: BaseModel
    oracle: PreTrainedModel
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = build_tiny_model(request.param, tmp_path_factory.mktemp("base") / request.param)
    oracle = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    return Pair(load(folder), oracle, prompts)


def load(folder: Path) -> BaseModel:
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


@torch.no_grad()
def generate(pair: Pair, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = pair.oracle.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


def test_greedy_tokens_equal_generate_alone_and_in_company(pair: Pair) -> None:
    wanted = [generate(pair, prompt) for prompt in pair.prompts]
    assert len(set(wanted[1])) > 4, "degenerate decoding would prove nothing"
    alone = [PagedDriver(pair.base).greedy([Running(prompt)], NUM_TOKENS)[0] for prompt in pair.prompts]
    assert alone == wanted
    together = [Running(prompt, arrival=3 * i) for i, prompt in enumerate(pair.prompts)]
    assert PagedDriver(pair.base).greedy(together, NUM_TOKENS, budget=13) == wanted


def test_logits_equal_transformers_in_chunks_and_mixed_lengths(pair: Pair) -> None:
    driver = PagedDriver(pair.base)
    found = driver.logits(pair.prompts, chunk=7)
    for prompt, rows in zip(pair.prompts, found, strict=True):
        with torch.no_grad():
            wanted = pair.oracle(torch.tensor([prompt]), use_cache=False).logits[0]
        assert (rows - wanted).abs().max() < 1e-4
    whole = driver.logits(pair.prompts)
    for chunked, rows in zip(found, whole, strict=True):
        assert (rows - chunked).abs().max() < 1e-4


def test_folded_logits_equal_transformers(pair: Pair) -> None:
    for prompt in pair.prompts[1:3]:
        with torch.no_grad():
            wanted = pair.oracle(torch.tensor([prompt]), use_cache=False).logits[0]
        assert (pair.base.folded_logits(torch.tensor(prompt), {}) - wanted).abs().max() < 1e-4


def test_linears_that_share_an_input_form_groups(pair: Pair, request: pytest.FixtureRequest) -> None:
    first = [[name.rpartition(".")[2] for name in group] for group in pair.base.groups()][:4]
    kind = pair.base.spec.model_type
    expected = {
        "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
        "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
        "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    }
    assert first == expected.get(
        kind, [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    )
    assert all("lm_head" not in name and "embed_out" not in name for name in pair.base.linears)
    layers = [spec.layer for spec in pair.base.spec.linears.values()]
    assert layers == sorted(layers)
    assert max(layers) == pair.base.spec.num_layers - 1


def test_base_weights_are_those_of_the_checkpoint(pair: Pair) -> None:
    for name in pair.base.linears:
        linear, module = pair.base.linear(name), pair.oracle.get_submodule(name)
        weight = module.weight.t() if linear.transposed else module.weight
        assert torch.equal(linear.rows(0, linear.out_features), weight)
        assert torch.equal(linear.rows(3, 5), weight[3:5])
        assert linear.transposed == (pair.base.spec.model_type == "gpt2")
        assert pair.base.spec.linears[name].has_bias == (module.bias is not None)
        if module.bias is not None:
            assert torch.equal(linear.bias, module.bias)
