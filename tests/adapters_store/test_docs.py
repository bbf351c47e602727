"""``docs/adapter-format.md`` says what the code does: its tables are made from the code's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from deltaserve.admission.reason_codes import PROOF_REASON_CODES
from deltaserve_store.file_names import CHECKED_FILES, STORED_FILES, FileRole, role_of
from deltaserve_store.formats import deltaserve_bottleneck, deltaserve_dense
from deltaserve_store.formats.deltaserve_blocks import FIELDS as BLOCK_FIELDS
from deltaserve_store.formats.deltaserve_rotations import FIELDS as ROTATION_FIELDS
from deltaserve_store.formats.deltaserve_sparse import FIELDS
from deltaserve_store.formats.deltaserve_terms import FIELDS as TERM_FIELDS
from deltaserve_store.formats.deltaserve_vectors import FIELDS as VECTOR_FIELDS
from deltaserve_store.formats.lora_vectors import PEFT_LORA_FIELDS
from deltaserve_store.formats.own_config import REQUIRED
from deltaserve_store.formats.peft_fields import SHIRA_FIELDS, FieldRule
from deltaserve_store.formats.peft_trainable_tokens import TOKENS_FIELDS
from deltaserve_store.formats.peft_vectors import IA3_FIELDS, LN_FIELDS
from deltaserve_store.reason_codes import REASON_CODES

DOC = Path(__file__).parents[2] / "docs" / "adapter-format.md"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _fields(rules: Mapping[str, FieldRule]) -> str:
    order = {"understood": 0, "descriptive": 1, "neutral-only": 2}
    lines = ["| field | treatment | accepted |", "| --- | --- | --- |"]
    for field, rule in sorted(rules.items(), key=lambda item: (order[item[1].treatment], item[0])):
        required = ", required" if rule.required else ""
        lines.append(f"| `{field}` | {rule.treatment}{required} | {_escape(rule.allowed)} |")
    return "\n".join(lines)


def _own_fields(fields: Mapping[str, str]) -> str:
    lines = ["| field | accepted |", "| --- | --- |"]
    lines += [f"| `{field}`{' (required)' if field in REQUIRED else ''} | {fields[field]} |" for field in fields]
    return "\n".join(lines)


def _module_fields() -> str:
    lines = ["| field of a module | accepted |", "| --- | --- |"]
    for field, allowed in deltaserve_bottleneck.MODULE_FIELDS.items():
        required = " (required)" if field in deltaserve_bottleneck.REQUIRED_OF_MODULE else ""
        lines.append(f"| `{field}`{required} | {allowed} |")
    return "\n".join(lines)


def _files() -> str:
    lines = ["| file | at most | what becomes of it |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {cap >> 20} MB | stored |" for name, cap in STORED_FILES.items()]
    lines += [
        f"| `{name}` | {cap >> 20} MB | read for added tokens, not stored |" for name, cap in CHECKED_FILES.items()
    ]
    return "\n".join(lines)


def _codes() -> str:
    lines = ["| code | meaning |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{code}` | {meaning} |" for code, meaning in REASON_CODES.items())])


def _proof_codes() -> str:
    lines = ["| code | meaning |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{code}` | {meaning} |" for code, meaning in PROOF_REASON_CODES.items())])


TABLES: dict[str, Callable[[], str]] = {
    "files": _files,
    "lora-fields": lambda: _fields(PEFT_LORA_FIELDS),
    "token-fields": lambda: _fields(TOKENS_FIELDS),
    "shira-fields": lambda: _fields(SHIRA_FIELDS),
    "ia3-fields": lambda: _fields(IA3_FIELDS),
    "ln-fields": lambda: _fields(LN_FIELDS),
    "sparse-fields": lambda: _own_fields(FIELDS),
    "block-fields": lambda: _own_fields(BLOCK_FIELDS),
    "vector-fields": lambda: _own_fields(VECTOR_FIELDS),
    "term-fields": lambda: _own_fields(TERM_FIELDS),
    "rotation-fields": lambda: _own_fields(ROTATION_FIELDS),
    "dense-fields": lambda: _own_fields(deltaserve_dense.FIELDS),
    "bottleneck-fields": lambda: _own_fields(deltaserve_bottleneck.FIELDS),
    "module-fields": _module_fields,
    "reason-codes": _codes,
    "proof-reason-codes": _proof_codes,
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    text = DOC.read_text(encoding="utf-8")
    _, _, rest = text.partition(f"<!-- table: {name} -->\n")
    table, _, _ = rest.partition("\n<!-- end -->")
    expected = TABLES[name]()
    assert table == expected, f"put this table into {DOC.name}:\n{expected}"


def test_file_names_in_the_text_have_the_role_it_gives() -> None:
    assert role_of("README.md") is role_of("vocab.json") is FileRole.SKIPPED
    assert role_of("tokenizer.json") is FileRole.CHECKED
    assert role_of("adapter_model.bin") is role_of("training_args.bin") is FileRole.PICKLE
    assert role_of("model.safetensors") is FileRole.UNKNOWN


def test_every_field_of_the_installed_peft_is_known() -> None:
    """A field that a newer PEFT brings is refused until it is understood; here is where one hears of it."""
    import dataclasses

    from peft import IA3Config, LNTuningConfig, LoraConfig, ShiraConfig, TrainableTokensConfig

    known = (
        (LoraConfig, PEFT_LORA_FIELDS),
        (ShiraConfig, SHIRA_FIELDS),
        (IA3Config, IA3_FIELDS),
        (LNTuningConfig, LN_FIELDS),
        (TrainableTokensConfig, TOKENS_FIELDS),
    )
    for config, rules in known:
        assert {field.name for field in dataclasses.fields(config)} <= set(rules)
