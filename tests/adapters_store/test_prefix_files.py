"""PEFT files of virtual tokens: what is read, and that damage of every sort is refused with its reason and place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.peft_prefixes import MAX_PROMPT_TOKENS, PREFIX_KINDS
from deltaserve_store.manifest import AdapterManifest
from deltaserve_store.prefix_deltas import KeyValuePrefix, PromptPrefix
from deltaserve_store.reason_codes import REASON_CODES
from deltatest.adapter_corpus import CONFIG, TENSORS, BadAdapter, corpus_base, edit_config, edit_tensors, set_value

BASE = corpus_base()
COUNT = 5
KEYS = {"token_dim": 8, "num_attention_heads": 2}
EXTRA: dict[str, dict[str, Any]] = {
    "PREFIX_TUNING": {"encoder_hidden_size": 8, "prefix_projection": False, **KEYS},
    "CARTRIDGE": {"num_frozen_tokens": 1, **KEYS},
    "MULTITASK_PROMPT_TUNING": {"num_ranks": 2, "num_tasks": 1, "prompt_tuning_init": "RANDOM"},
    "CPT": {"cpt_token_ids": [1, 2, 3, 4, 5], "cpt_mask": [1] * 5, "cpt_tokens_type_mask": [1] * 5},
}


def tensors_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = 2 * 2 * 8 if PREFIX_KINDS[kind].has_keys else 16
    tensors = {"prompt_embeddings": torch.randn(COUNT, width, generator=generator)}
    if kind == "MULTITASK_PROMPT_TUNING":
        tensors["prefix_task_cols"] = torch.randn(1, COUNT, 2, generator=generator)
        tensors["prefix_task_rows"] = torch.randn(1, 2, 16, generator=generator)
    return tensors


def write_good(folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(kind), folder / TENSORS)
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tests/corpus-base",
        "num_virtual_tokens": COUNT,
        "token_dim": 16,
        "num_attention_heads": 4,
        "num_layers": 2,
        "num_transformer_submodules": 1,
        "inference_mode": True,
        **EXTRA.get(kind, {}),
    }
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def damage(kind: str) -> Iterator[BadAdapter]:
    def tensor(what: str, code: str, name: str, change: Any) -> BadAdapter:
        return BadAdapter(f"{name} {what}", kind, edit_tensors({name: change}), ((code, name),))

    def config(field: str, value: Any, code: str) -> BadAdapter:
        shown = "missing" if value is ... else json.dumps(value)[:30]
        return BadAdapter(f"{field}={shown}", kind, edit_config(**{field: value}), ((code, f"{CONFIG}:{field}"),))

    for name in tensors_of(kind):
        renamed = edit_tensors({name: None, f"{name}_": torch.ones(2, 2)})
        reasons = (("missing_tensor", name), ("unexpected_tensor", f"{name}_"))
        yield BadAdapter(f"{name} under another name", kind, renamed, reasons)
        yield tensor("too wide", "shape_mismatch", name, lambda old: torch.cat((old, old), dim=-1))
        yield tensor("one token short", "shape_mismatch", name, lambda old: old[..., 1:, :].contiguous())
        yield tensor("of one more dimension", "shape_mismatch", name, lambda old: old.reshape(-1, 1, 1))
        yield tensor("with NaN", "non_finite", name, set_value(float("nan")))
        yield tensor("with infinity", "non_finite", name, set_value(float("-inf")))
        yield tensor("with a huge value", "value_out_of_range", name, set_value(1e30))
        yield tensor("of integers", "unsupported_dtype", name, lambda old: old.to(torch.int32))
    for name in ("prompt_encoder.default.mlp_head.0.weight", "base_model.model.model.layers.0.self_attn.q_proj.lora_A"):
        yield tensor("is stray", "unexpected_tensor", name, torch.ones(2, 2))
    yield config("wings", 2, "unknown_field")
    yield config("target_modules", ["q_proj"], "unknown_field")
    yield config("task_type", "SEQ_CLS", "unsupported_feature")
    yield config("task_type", None, "unsupported_feature")
    yield config("modules_to_save", ["lm_head"], "unsupported_feature")
    yield config("num_transformer_submodules", 2, "unsupported_feature")
    yield config("num_virtual_tokens", ..., "missing_field")
    for value in (0, -1, 1.5, True, "5", None):
        yield config("num_virtual_tokens", value, "invalid_value")
    yield config("num_layers", 3, "shape_mismatch")
    yield config("token_dim", 12, "shape_mismatch")
    if PREFIX_KINDS[kind].has_keys:
        yield config("num_attention_heads", 4, "shape_mismatch")
    elif kind != "CPT":
        yield config("num_virtual_tokens", MAX_PROMPT_TOKENS + 1, "prefix_too_long")
    if kind == "MULTITASK_PROMPT_TUNING":
        yield config("num_tasks", 2, "unsupported_feature")
        yield config("num_ranks", 0, "invalid_value")
    if kind == "CPT":
        yield BadAdapter(
            "ids fewer than tokens",
            kind,
            edit_config(cpt_token_ids=[1, 2]),
            (("invalid_value", f"{CONFIG}:num_virtual_tokens"),),
        )


CORPUS = [case for kind in PREFIX_KINDS for case in damage(kind)]
GOOD: dict[str, Callable[[Path], Path]] = {kind: partial(write_good, kind=kind) for kind in PREFIX_KINDS}


@pytest.mark.parametrize("kind", PREFIX_KINDS)
def test_good_files_get_in(kind: str, tmp_path: Path) -> None:
    parsed = read_adapter(GOOD[kind](tmp_path / "a"), BASE)
    assert (parsed.kind, parsed.file_format) == ("prefix", "peft-" + kind.lower().replace("_", "-"))
    assert (parsed.num_prefix_tokens, parsed.rank, parsed.deltas) == (COUNT, None, ())
    assert parsed.num_parameters == sum(tensor.numel() for tensor in tensors_of(kind).values())
    wanted = KeyValuePrefix if PREFIX_KINDS[kind].has_keys else PromptPrefix
    assert isinstance(parsed.prefix, wanted)


@pytest.mark.parametrize("kind", PREFIX_KINDS)
def test_what_peft_can_derive_from_the_base_may_be_null(kind: str, tmp_path: Path) -> None:
    folder = GOOD[kind](tmp_path / "a")
    edit_config(token_dim=None, num_layers=None, num_attention_heads=None, num_transformer_submodules=None)(folder)
    assert read_adapter(folder, BASE).num_prefix_tokens == COUNT


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: f"{case.kind}: {case.name}")
def test_refused_with_its_reasons(case: BadAdapter, tmp_path: Path) -> None:
    folder = GOOD[case.kind](tmp_path / "adapter")
    case.spoil(folder)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, BASE)
    assert {(reason.code, reason.where) for reason in raised.value.reasons} == set(case.reasons)
    for reason in raised.value.reasons:
        assert reason.code in REASON_CODES
        assert reason.found
        assert reason.allowed


def test_every_field_of_the_installed_peft_is_known() -> None:
    """A field that a newer PEFT brings is refused until it is understood; here is where one hears of it."""
    import dataclasses

    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind, reader in PREFIX_KINDS.items():
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        assert {field.name for field in dataclasses.fields(config)} <= set(reader.fields), kind


def test_the_manifest_knows_the_length_and_that_of_others_is_what_it_was() -> None:
    plain = AdapterManifest("a", ("lora",), "peft-lora", 4, 1, 1, 1, None, None, None, (), ())
    assert "num_prefix_tokens" not in plain.to_json()
    long = AdapterManifest("a", ("prefix",), "peft-cpt", None, 1, 1, 0, None, None, None, (), (), num_prefix_tokens=7)
    for manifest in (plain, long):
        assert AdapterManifest.from_json(manifest.to_json()) == manifest
