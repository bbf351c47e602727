"""Adapters written by PEFT itself: what we read equals PEFT's own merged weights, to the last bit of float32."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltatest.base_specs import BASE_NAME, spec_of, tiny_model
from deltatest.of_kind import all_of
from deltatest.peft_adapters import edit_config, edit_tensors, make_peft_lora, make_peft_shira

LLAMA_LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"rank": 4, "alpha": 7},
    "rslora": {"rank": 8, "alpha": 16, "use_rslora": True},
    "one-target": {"targets": ["q_proj"]},
    "full-paths": {"targets": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]},
    "suffix-of-two": {"targets": ["self_attn.q_proj", "mlp.up_proj"]},
    "rank-pattern": {"rank": 8, "rank_pattern": {"q_proj": 2, "mlp.down_proj": 16}},
    "rank-pattern-path": {"rank_pattern": {"model.layers.1.self_attn.k_proj": 3, "^model.layers.0.mlp.up_proj": 5}},
    "rank-pattern-digits": {"rank_pattern": {r"layers\.\d+\.self_attn\.v_proj": 3}},
    "alpha-pattern": {"alpha": 16, "alpha_pattern": {"v_proj": 4, "model.layers.0.mlp.gate_proj": 100}},
    "both-patterns-rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 4, "o_proj": 1},
        "alpha_pattern": {"q_proj": 3},
    },
    "layers": {"layers": [1]},
    "layers-pattern": {"layers": [0], "layers_pattern": "layers"},
    "layers-and-path": {"layers": [1], "targets": ["q_proj", "model.layers.0.self_attn.v_proj"]},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj", "down_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "bfloat16": {"dtype": torch.bfloat16},
    "odd-names-too": {"targets": ["q_proj", "c_attn", "query_key_value"]},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return tiny_model("gpt2", tmp_path_factory.mktemp("gpt2"))


def peft_deltas(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Oracle: PEFT loads the folder; its own delta of each wrapped module, float32 ``[out, in]``."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    deltas = {}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            delta = module.get_delta_weight("default").detach().float()
            delta = delta.to_dense() if delta.is_sparse else delta
            deltas[name] = delta.T if isinstance(module.get_base_layer(), Conv1D) else delta
    return deltas


def our_delta(delta: LoraDelta | SparseDelta, shape: tuple[int, int]) -> torch.Tensor:
    if isinstance(delta, LoraDelta):
        return (delta.b.float() @ delta.a.float()) * delta.scaling
    dense = torch.zeros(shape)
    dense[delta.rows.long(), delta.cols.long()] = delta.values.float()
    return dense


def assert_equals_peft(model: torch.nn.Module, folder: Path) -> None:
    base = spec_of(model)
    parsed = read_adapter(folder, base)
    expected = peft_deltas(model, folder)
    assert {delta.module for delta in parsed.deltas} == set(expected)
    for delta in parsed.deltas:
        linear = base.linears[delta.module]
        actual = our_delta(delta, (linear.out_features, linear.in_features))
        assert expected[delta.module].abs().max() > 0
        torch.testing.assert_close(actual, expected[delta.module], rtol=0, atol=0)


@pytest.mark.parametrize("case", LLAMA_LORAS)
def test_lora_equals_peft(case: str, llama: torch.nn.Module, tmp_path: Path) -> None:
    folder = make_peft_lora(llama, tmp_path / "adapter", **LLAMA_LORAS[case])
    assert_equals_peft(llama, folder)
    parsed = read_adapter(folder, spec_of(llama))
    assert (parsed.kind, parsed.file_format, parsed.base_name) == ("lora", "peft-lora", BASE_NAME)
    stored = load_file(folder / "adapter_model.safetensors")
    assert parsed.num_parameters == sum(tensor.numel() for tensor in stored.values())
    assert parsed.rank == max(tensor.shape[0] for name, tensor in stored.items() if "lora_A" in name)


def test_all_linear_equals_peft(llama: torch.nn.Module, tmp_path: Path) -> None:
    """``all-linear`` is written as the names it stood for; the word itself means the same to us."""
    folder = make_peft_lora(llama, tmp_path / "adapter")
    edit_config(folder, target_modules="all-linear")
    assert_equals_peft(llama, folder)


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"]])
def test_conv1d_lora_equals_peft(targets: list[str], gpt2: torch.nn.Module, tmp_path: Path) -> None:
    folder = make_peft_lora(gpt2, tmp_path / "adapter", targets=targets, fan_in_fan_out=True)
    assert_equals_peft(gpt2, folder)


@pytest.mark.parametrize(
    ("name", "targets"), [("gpt-neox", ["query_key_value"]), ("phi3", ["qkv_proj", "gate_up_proj"])]
)
def test_fused_modules_equal_peft(name: str, targets: list[str], tmp_path: Path) -> None:
    model = tiny_model(name, tmp_path / "model")
    assert_equals_peft(model, make_peft_lora(model, tmp_path / "adapter", targets=targets))


@pytest.mark.parametrize("rank", [1, 3])
def test_shira_equals_peft(rank: int, llama: torch.nn.Module, tmp_path: Path) -> None:
    folder = make_peft_shira(llama, tmp_path / "adapter", rank=rank)
    assert_equals_peft(llama, folder)
    parsed = read_adapter(folder, spec_of(llama))
    assert (parsed.kind, parsed.file_format, parsed.rank) == ("sparse", "peft-shira", None)


def test_shira_merged_weights(llama: torch.nn.Module, tmp_path: Path) -> None:
    """The other end of PEFT: base plus our delta is what ``merge_and_unload`` leaves."""
    from peft import PeftModel

    folder = make_peft_shira(llama, tmp_path / "adapter", targets=["q_proj"])
    merged = PeftModel.from_pretrained(copy.deepcopy(llama), str(folder)).merge_and_unload().state_dict()
    base = llama.state_dict()
    for delta in read_adapter(folder, spec_of(llama)).deltas:
        weight = base[f"{delta.module}.weight"]
        expected = merged[f"{delta.module}.weight"]
        torch.testing.assert_close(weight + our_delta(delta, tuple(weight.shape)), expected, rtol=0, atol=0)


def test_shira_indices_of_windows(llama: torch.nn.Module, tmp_path: Path) -> None:
    """On Windows PEFT saves indices as float32; whole numbers are read back, anything else is refused."""
    folder = make_peft_shira(llama, tmp_path / "adapter", targets=["q_proj"])
    name = "base_model.model.model.layers.0.self_attn.q_proj.shira_indices"
    expected = read_adapter(folder, spec_of(llama))
    indices = load_file(folder / "adapter_model.safetensors")[name].float()
    edit_tensors(folder, {name: indices})
    actual = read_adapter(folder, spec_of(llama))
    pairs = zip(all_of(SparseDelta, actual.deltas), all_of(SparseDelta, expected.deltas), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours.rows, theirs.rows)
    indices[0, 0] += 0.5
    edit_tensors(folder, {name: indices})
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, spec_of(llama))
    assert [(reason.code, reason.where) for reason in raised.value.reasons] == [("index_out_of_range", name)]


def test_shira_entries_are_sorted(llama: torch.nn.Module, tmp_path: Path) -> None:
    folder = make_peft_shira(llama, tmp_path / "adapter", targets=["q_proj"])
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    stored = load_file(folder / "adapter_model.safetensors")
    order = torch.randperm(stored[f"{prefix}.shira_weight"].shape[0], generator=torch.Generator().manual_seed(1))
    shuffled = {
        f"{prefix}.shira_indices": stored[f"{prefix}.shira_indices"][:, order].contiguous(),
        f"{prefix}.shira_weight": stored[f"{prefix}.shira_weight"][order].contiguous(),
    }
    before = read_adapter(folder, spec_of(llama)).deltas[0]
    edit_tensors(folder, shuffled)
    after = read_adapter(folder, spec_of(llama)).deltas[0]
    assert isinstance(before, SparseDelta)
    assert isinstance(after, SparseDelta)
    assert torch.equal(before.rows, after.rows)
    assert torch.equal(before.cols, after.cols)
    assert torch.equal(before.values, after.values)


def test_config_as_tools_write_it(llama: torch.nn.Module, tmp_path: Path) -> None:
    """Fields other tools add that change nothing, and files that come along, do not stand in the way."""
    folder = make_peft_lora(llama, tmp_path / "adapter")
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    edit_config(folder, auto_mapping={**mapping, "unsloth_fixed": True}, runtime_config={}, enable_lora=None)
    (folder / "README.md").write_text("# adapter")
    (folder / "added_tokens.json").write_text('{"<pad>": 0}')
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"198": {"content": "<x>"}}}')
    parsed = read_adapter(folder, spec_of(llama))
    assert parsed.skipped == ("README.md",)


def test_first_pattern_of_the_file_wins(llama: torch.nn.Module, tmp_path: Path) -> None:
    """PEFT saves keys sorted and takes the first that matches; so do we, whatever seems more specific."""
    folder = make_peft_lora(llama, tmp_path / "adapter", targets=["q_proj"])
    edit_config(folder, alpha_pattern={"q_proj": 2.0, "layers.0.self_attn.q_proj": 50.0})
    assert_equals_peft(llama, folder)
    deltas = all_of(LoraDelta, read_adapter(folder, spec_of(llama)).deltas)
    assert {delta.scaling for delta in deltas} == {2.0 / 8}
