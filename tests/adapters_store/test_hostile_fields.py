"""Configs made to hurt: numbers that no float holds, long lists, many patterns. They are refused, or read, soon."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.findings import Findings
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.lora_vectors import PEFT_LORA_FIELDS
from deltaserve_store.formats.module_match import PatternTable
from deltaserve_store.formats.peft_fields import LORA_FIELDS, SHIRA_FIELDS, FieldRule
from deltaserve_store.formats.peft_kinds.table import READERS
from deltaserve_store.formats.peft_kinds.vblora import VbLora
from deltaserve_store.formats.peft_prefixes import PREFIX_KINDS
from deltaserve_store.formats.peft_trainable_tokens import TOKENS_FIELDS
from deltaserve_store.formats.peft_vectors import IA3_FIELDS, LN_FIELDS
from deltaserve_store.parsed import LoraDelta
from deltaserve_store.spec import LinearSpec
from deltatest.adapter_corpus import CONFIG, corpus_base, edit_config, write_good_lora
from deltatest.kind_corpus import GOOD_KINDS
from deltatest.largest import Largest

TABLES: dict[str, Mapping[str, FieldRule]] = {
    "lora": PEFT_LORA_FIELDS,
    "plain lora": LORA_FIELDS,
    "shira": SHIRA_FIELDS,
    "ia3": IA3_FIELDS,
    "ln tuning": LN_FIELDS,
    "tokens": TOKENS_FIELDS,
    **{name: kind.fields for name, kind in PREFIX_KINDS.items()},
    **{name: reader.fields for name, reader in READERS.items()},
}
HUGE = 10**400
VALUES: tuple[Any, ...] = (
    None,
    True,
    HUGE,
    -HUGE,
    0,
    -0.5,
    1e308,
    "",
    "x" * 5000,
    [],
    [HUGE],
    [[]],
    [None, "a", 1],
    {},
    {"a": HUGE},
    {"(a+)+$": 1},
    {"a": [HUGE, {}]},
)


@pytest.mark.parametrize("table", TABLES)
def test_every_field_has_a_verdict_on_whatever_json_can_say(table: str) -> None:
    for field, rule in TABLES[table].items():
        for value in VALUES:
            assert rule.accepts(value) in (True, False), (field, value)
            if rule.per_key is not None:
                assert rule.per_key(value) in (True, False), (field, value)


@pytest.mark.parametrize(("field", "code"), [("lora_dropout", "invalid_value"), ("lora_alpha", "invalid_value")])
def test_a_number_that_no_float_holds_is_refused(field: str, code: str, tmp_path: Path) -> None:
    folder = write_good_lora(tmp_path / "adapter")
    edit_config(**{field: HUGE})(folder)
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, corpus_base())
    assert [(reason.code, reason.where) for reason in raised.value.reasons] == [(code, f"{CONFIG}:{field}")]


def test_a_token_twice_in_the_longest_list_is_found_soon(tmp_path: Path) -> None:
    """Looking back through the list for each of its tokens took minutes."""
    folder = write_good_lora(tmp_path / "adapter")
    edit_config(trainable_token_indices=[*range(65_535), 65_534])(folder)
    before = time.monotonic()
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(folder, replace(corpus_base(), vocab_size=70_000, num_tokens=70_000))
    assert time.monotonic() - before < 5.0
    assert ("duplicate_index", "token 65534 twice") in [(r.code, r.found) for r in raised.value.reasons]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("lora", "alpha_pattern", 8),
        ("loha", "rank_pattern", 2),
        ("lokr", "alpha_pattern", 4),
        ("delora", "rank_pattern", 3),
        ("c3a", "block_size_pattern", 8),
        ("fourierft", "n_frequency_pattern", 3),
        ("waveft", "n_frequency_pattern", 5),
    ],
)
def test_a_pattern_is_compiled_once_however_many_linears_there_are(
    kind: str, field: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = (write_good_lora if kind == "lora" else GOOD_KINDS[kind])(tmp_path / "adapter")
    edit_config(**{field: {f"blocks.{number}.proj": value for number in range(50)}})(folder)
    compiled: list[str] = []
    compile_all = PatternTable.__init__

    def counting(table: PatternTable, patterns: Mapping[str, float]) -> None:
        compiled.extend(patterns)
        compile_all(table, patterns)

    monkeypatch.setattr(PatternTable, "__init__", counting)
    read_adapter(folder, corpus_base())
    assert len(compiled) == 50


def _random_parts(reader: VbLora, linear: LinearSpec, count: int) -> dict[str, torch.Tensor]:
    parts = {}
    for name, rule in reader.layout(linear).items():
        if name.endswith("indices"):
            parts[name] = torch.randint(0, count, rule.shape, dtype=torch.int32)
        else:
            parts[name] = torch.rand(rule.shape) / max(1, rule.shape[-1])
    return parts


@pytest.mark.parametrize(
    ("is_cut", "count", "length", "topk"),
    [(False, 1000, 64, 1000), (True, 1000, 64, 1000), (True, 4096, 1, 2)],
    ids=["whole logits", "many vectors in a piece", "a large bank"],
)
def test_mixing_vectors_of_a_bank_makes_nothing_larger_than_the_file(
    is_cut: bool, count: int, length: int, topk: int
) -> None:
    """The vectors that are chosen, side by side, or the shares of a whole bank would be some hundred times its size."""
    torch.manual_seed(0)
    config = {
        "r": 4,
        "num_vectors": count,
        "vector_length": length,
        "topk": topk,
        "save_only_topk_weights": is_cut,
    }
    linear = LinearSpec("q_proj", 64, 64)
    reader = VbLora(config, (linear,), CONFIG)
    parts = _random_parts(reader, linear, count)
    given = max(count * length, *(tensor.numel() for tensor in parts.values()), 64 * 64)
    with Largest() as largest:
        reader.begin({"base_model.vblora_vector_bank": torch.randn(count, length)}, Findings())
        delta = reader.convert(linear, parts, Findings())
        assert isinstance(delta, LoraDelta)
        assert delta.dense is not None
        whole = delta.dense()
    assert largest.numel <= 2 * given
    assert torch.allclose(delta.b @ delta.a, whole, rtol=1e-4, atol=1e-4)
