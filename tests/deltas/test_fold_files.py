"""From real files to terms: what PEFT wrote, read by the store and folded, changes the model as PEFT says it does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from deltaserve.deltas.fold import dense_delta, fold
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import SparseDelta
from deltaserve_store.spec import BaseSpec
from deltatest.base_specs import spec_of
from deltatest.of_kind import all_of
from deltatest.peft_adapters import base_logits, make_peft_lora, make_peft_shira, make_sparse, peft_logits

IDS = (3, 17, 60, 2, 9, 41, 41, 5)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


def folded_logits(model: torch.nn.Module, folded: FoldedAdapter, spec: BaseSpec) -> torch.Tensor:
    """The delta of the folded form added to the weights of a copy."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name in folded.terms:
            weight = changed.get_submodule(name).get_parameter("weight")
            delta = dense_delta(folded, name, spec)
            weight.add_(delta.t() if spec.linears[name].transposed else delta)
    return base_logits(changed, IDS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank": 5, "alpha": 7},
        {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 11}, "alpha_pattern": {"v_proj": 2, "q_proj": 5}},
        {"layers": [1], "targets": ["o_proj", "down_proj"], "dtype": torch.bfloat16},
    ],
    ids=["plain", "rslora", "patterns", "layers"],
)
def test_lora_files_equal_peft(llama: LlamaForCausalLM, tmp_path: Path, options: dict) -> None:
    folder = make_peft_lora(llama, tmp_path / "adapter", **options)
    spec = spec_of(llama)
    folded = fold(read_adapter(folder, spec), spec, torch.float32)
    expected = peft_logits(llama, folder, IDS)
    assert (expected - base_logits(llama, IDS)).abs().max() > 0.05
    torch.testing.assert_close(folded_logits(llama, folded, spec), expected, atol=1e-4, rtol=0)


def test_conv1d_files_equal_peft(gpt2: GPT2LMHeadModel, tmp_path: Path) -> None:
    folder = make_peft_lora(gpt2, tmp_path / "adapter", targets=["c_attn", "c_fc"], fan_in_fan_out=True)
    spec = spec_of(gpt2)
    folded = fold(read_adapter(folder, spec), spec, torch.float32)
    expected = peft_logits(gpt2, folder, IDS)
    assert (expected - base_logits(gpt2, IDS)).abs().max() > 0.05
    torch.testing.assert_close(folded_logits(gpt2, folded, spec), expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_shira_files_equal_peft(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = make_peft_shira(llama, tmp_path / "adapter", std=0.2)
    spec = spec_of(llama)
    folded = fold(read_adapter(folder, spec), spec, torch.float32)
    assert folded.kinds == ("sparse",)
    expected = peft_logits(llama, folder, IDS)
    assert (expected - base_logits(llama, IDS)).abs().max() > 0.05
    torch.testing.assert_close(folded_logits(llama, folded, spec), expected, atol=1e-4, rtol=0)


def test_own_sparse_files_equal_the_changed_weights(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    spec = spec_of(llama)
    adapter = read_adapter(make_sparse(spec, tmp_path / "adapter"), spec)
    folded = fold(adapter, spec, torch.float32)
    assert set(folded.terms) == set(spec.linears)
    for delta in all_of(SparseDelta, adapter.deltas):
        dense = torch.zeros(spec.linears[delta.module].out_features, spec.linears[delta.module].in_features)
        dense[delta.rows.long(), delta.cols.long()] = delta.values
        assert torch.equal(dense_delta(folded, delta.module, spec), dense)
    assert (folded_logits(llama, folded, spec) - base_logits(llama, IDS)).abs().max() > 0.05
