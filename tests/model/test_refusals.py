"""What cannot be served is refused at load, by name, before anything is answered wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from deltaserve.errors import ConfigError, UnsupportedBase
from deltaserve.model import base as base_module
from deltaserve.model.attention import AttentionSpec
from deltaserve.model.base import load_base
from deltatest.tiny_models import build_tiny_model, save_random, tiny_config

torch.set_num_threads(1)


def load(folder: Path, **settings: Any) -> None:
    load_base(folder, dtype=torch.float32, cache_dir=folder / "cache", **settings)


def write_config(folder: Path, config: PreTrainedConfig | dict[str, Any]) -> Path:
    raw = config if isinstance(config, dict) else config.to_dict()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        ("mixtral", "mixture of experts (num_local_experts="),
        ("qwen2_moe", "mixture of experts (num_experts="),
        ("qwen3_moe", "mixture of experts (num_local_experts=128)"),
        ("deepseek_v3", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("llava", "multimodal"),
        ("gemma3", "multimodal"),
        ("mamba", "recurrent state"),
        ("rwkv", "recurrent state"),
        ("recurrent_gemma", "served"),
        ("qwen3_next", "not served"),
        ("falcon_h1", "recurrent state"),
        ("llama4_text", "not served"),
        ("bert", "neither causal"),
    ],
)
def test_architecture_is_refused_by_name(model_type: str, named: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2}
    if model_type in ("llava", "gemma3"):
        config = AutoConfig.for_model(model_type)
    else:
        config = AutoConfig.for_model(model_type, **sizes)
    with pytest.raises(UnsupportedBase) as refusal:
        load(write_config(tmp_path, config), load_format="dummy")
    assert named in refusal.value.message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "rope type 'dynamic'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized checkpoint (gptq)"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ({"model_type": "no_such_architecture"}, "no_such_architecture"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"vision_config": {"hidden_size": 3}}, "multimodal"),
    ],
)
def test_configuration_is_refused_by_name(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    raw = {**tiny_config("llama").to_dict(), **change}
    with pytest.raises(UnsupportedBase) as refusal:
        load(write_config(tmp_path, raw), load_format="dummy")
    assert named in refusal.value.message


def test_positions_without_rope_or_limit_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=99, hidden_size=32, n_layer=2, n_head=2)
    with pytest.raises(UnsupportedBase):
        load(write_config(tmp_path, config), load_format="dummy")


def test_shared_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    folder = build_tiny_model("llama", tmp_path / "base")
    weights = folder / "model.safetensors"

    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedBase, match=r"pytorch_model\.bin .* only safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").rename(weights)

    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedBase, match=r"adapter_config\.json"):
        load(folder)
    (folder / "adapter_config.json").unlink()
    load(folder)

    with pytest.raises(ConfigError, match=r"no folder 'somebody/model'.*--allow-hub"):
        load_base("somebody/model", dtype=torch.float32)
    with pytest.raises(ConfigError, match="float64"):
        load_base(folder, dtype=torch.float64)
    with pytest.raises(ConfigError, match="'pt'"):
        load(folder, load_format="pt")
    (folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedBase, match="not valid JSON"):
        load(folder)


def test_missing_extra_and_misshapen_tensors_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_tiny_model("mistral", tmp_path / "base")
    weights = folder / "model.safetensors"
    whole = load_file(weights)
    key = "model.layers.1.mlp.up_proj.weight"

    save_file({name: tensor for name, tensor in whole.items() if name != key}, weights, {"format": "pt"})
    with pytest.raises(UnsupportedBase, match=f"lacks 1 tensors.*{key}"):
        load(folder)
    save_file({**whole, "model.layers.1.mlp.extra.weight": whole[key].clone()}, weights, {"format": "pt"})
    with pytest.raises(UnsupportedBase, match=r"has 1 tensors the architecture lacks.*extra\.weight"):
        load(folder)
    save_file({**whole, key: whole[key][:5].clone()}, weights, {"format": "pt"})
    with pytest.raises(UnsupportedBase, match=rf"{key} of base is \[5, 64\]; the architecture needs \[96, 64\]"):
        load(folder)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(UnsupportedBase, match="cannot be read"):
        load(folder)


def test_shards_are_read_and_a_missing_or_foreign_one_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = build_tiny_model("llama", tmp_path / "base")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="100KB")
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 1
    load(sharded)
    index = sharded / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace(shards[0].name, "../" + shards[0].name))
    with pytest.raises(UnsupportedBase, match=r"\.\./"):
        load(sharded)
    index.write_text(text)
    shards[1].unlink()
    with pytest.raises(UnsupportedBase, match=f"lacks {shards[1].name}"):
        load(sharded)


def test_a_base_that_computes_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison at load is the last net: here attention is given the wrong scale."""
    folder = build_tiny_model("llama", tmp_path)
    attach = base_module.attach_spec

    def attach_wrongly(module: torch.nn.Module, spec: AttentionSpec) -> None:
        attach(module, AttentionSpec(spec.layer, spec.scale * 1.01, spec.window, spec.softcap))

    monkeypatch.setattr(base_module, "attach_spec", attach_wrongly)
    with pytest.raises(UnsupportedBase, match="llama computed through paged attention differs"):
        load(folder)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = build_tiny_model("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("inf"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedBase, match="not finite"):
        load(folder)


def test_bidirectional_attention_is_refused(tmp_path: Path) -> None:
    config = tiny_config("gemma3_text", head_dim=16, use_bidirectional_attention=True)
    save_random(config, tmp_path)
    with pytest.raises(UnsupportedBase, match="mask"):
        load(tmp_path)
