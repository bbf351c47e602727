"""Activated LoRA at rest: the invocation is read and kept, and what has no meaning with it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.manifest import AdapterManifest
from deltatest.adapter_corpus import corpus_base, write_good_lora
from deltatest.peft_adapters import edit_config

FIELD = "alora_invocation_tokens"


def refused(folder: Path, **config: Any) -> set[tuple[str, str]]:
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter(edit_config(write_good_lora(folder), **config), corpus_base())
    return {(reason.code, reason.where.partition(":")[2]) for reason in caught.value.reasons}


def test_the_invocation_is_read(tmp_path: Path) -> None:
    assert read_adapter(write_good_lora(tmp_path / "plain"), corpus_base()).invocation_token_ids == ()
    folder = edit_config(write_good_lora(tmp_path / "a"), **{FIELD: [5, 0, 5]})
    parsed = read_adapter(folder, corpus_base())
    assert parsed.invocation_token_ids == (5, 0, 5)
    assert len(parsed.deltas) == 4


@pytest.mark.parametrize("value", [[], "5", 5, [5, -1], [5, 1.0], [True], [None], [[5]], {"5": 1}, [5] * 65])
def test_what_is_no_list_of_token_ids_is_refused(tmp_path: Path, value: Any) -> None:
    assert refused(tmp_path / "a", **{FIELD: value}) == {("invalid_value", FIELD)}


def test_tokens_that_the_base_does_not_have_are_refused(tmp_path: Path) -> None:
    limit = corpus_base().num_tokens or corpus_base().vocab_size
    assert refused(tmp_path / "a", **{FIELD: [1, limit]}) == {("invalid_value", FIELD)}


def test_what_peft_does_not_activate_is_refused(tmp_path: Path) -> None:
    assert ("unsupported_feature", "use_dora") in refused(tmp_path / "a", **{FIELD: [5], "use_dora": True})
    assert ("unsupported_feature", "bias") in refused(tmp_path / "b", **{FIELD: [5], "bias": "all"})


def test_manifests_keep_it_and_older_ones_have_none() -> None:
    parts: dict[str, Any] = dict.fromkeys(("base_name", "base_fingerprint", "chat_template", "rank"))
    manifest = AdapterManifest(
        version="0" * 64, kinds=("lora",), file_format="peft-lora", bytes=1, num_parameters=1, num_modules=1,
        stop_token_ids=(), files=(), invocation_token_ids=(5, 6), **parts,
    )  # fmt: skip
    assert AdapterManifest.from_json(manifest.to_json()) == manifest
    plain = replace(manifest, invocation_token_ids=())
    assert "invocation" not in plain.to_json()
    assert AdapterManifest.from_json(plain.to_json()) == plain
