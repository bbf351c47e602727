"""From a folder of files to a ``ParsedAdapter``, or to every reason why not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.file_names import (
    INITIAL_TENSORS,
    MAX_TENSOR_FILE_BYTES,
    PEFT_CONFIG,
    PEFT_TENSORS,
    REFUSALS,
    SPARSE_CONFIG,
    SPARSE_TENSORS,
    FileRole,
    cap_of,
    role_of,
)
from deltaserve_store.findings import Findings, refuse
from deltaserve_store.formats.added_rows import check_head_bias, with_added_tokens
from deltaserve_store.formats.json_file import read_json_object
from deltaserve_store.formats.own_formats import parse_own
from deltaserve_store.formats.peft_kinds.low_rank import DEFAULT_LIMITS, ConversionLimits
from deltaserve_store.formats.peft_kinds.reader import read_kind
from deltaserve_store.formats.peft_kinds.table import READERS, peft_type_of
from deltaserve_store.formats.peft_lora import parse_peft_lora
from deltaserve_store.formats.peft_prefixes import PREFIX_KINDS, parse_peft_prefix
from deltaserve_store.formats.peft_shira import parse_peft_shira
from deltaserve_store.formats.peft_trainable_tokens import parse_peft_trainable_tokens
from deltaserve_store.formats.peft_vectors import VECTOR_READERS
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.formats.tokenizer_files import read_added_tokens
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec

MAX_FILES = 256
PARSERS: Mapping[str, Callable[[Mapping[str, Any], str, TensorFile, BaseSpec, Findings], ParsedAdapter | None]] = {
    "LORA": parse_peft_lora,
    "SHIRA": parse_peft_shira,
    "TRAINABLE_TOKENS": parse_peft_trainable_tokens,
    **VECTOR_READERS,
}
"""By PEFT type, where a type has a parser of its own; the others are in ``READERS`` and ``PREFIX_KINDS``."""


def read_adapter(folder: Path, base: BaseSpec, limits: ConversionLimits = DEFAULT_LIMITS) -> ParsedAdapter:
    """Checks and reads the adapter in ``folder``: a PEFT type that is served, or one of the project's own.

    Every tensor is accounted for, every config field understood, every value finite, or ``AdapterInvalid`` (its
    subclass ``BaseMismatch`` for another base) is raised with all reasons. Whether a PEFT file's ``base_name`` is a
    name of this base is the caller's to decide. ``limits``: what conversions may cost.
    """
    findings = Findings()
    names, skipped = _list_files(folder, findings)
    added = read_added_tokens(folder, names, base, findings)
    check_head_bias(added, base, findings)
    peft, sparse = PEFT_CONFIG in names or PEFT_TENSORS in names, SPARSE_CONFIG in names or SPARSE_TENSORS in names
    if peft and sparse:
        found = ", ".join(sorted(names & {PEFT_CONFIG, PEFT_TENSORS, SPARSE_CONFIG, SPARSE_TENSORS}))
        findings.add("ambiguous_format", "files", found, "the two files of one format")
        findings.raise_if_any()
    config_name, tensors_name = (SPARSE_CONFIG, SPARSE_TENSORS) if sparse else (PEFT_CONFIG, PEFT_TENSORS)
    for name in (config_name, tensors_name):
        if name not in names:
            found = ", ".join(sorted(names | set(skipped))) or "no files"
            wanted = f"{PEFT_CONFIG} and {PEFT_TENSORS}, or {SPARSE_CONFIG} and {SPARSE_TENSORS}"
            findings.add("missing_file", name, found, wanted)
    grown = base.with_added_tokens(len(added))
    parsed = _parse(folder, config_name, tensors_name, names, grown, findings, limits)
    findings.raise_if_any()
    if parsed is None:
        raise refuse("missing_file", "files", "no adapter", "an adapter")
    parsed = with_added_tokens(parsed, added, base, findings)
    findings.raise_if_any()
    return replace(parsed, skipped=skipped)


def _parse(
    folder: Path,
    config_name: str,
    tensors_name: str,
    names: set[str],
    base: BaseSpec,
    findings: Findings,
    limits: ConversionLimits,
) -> ParsedAdapter | None:
    """Reads what is there even when something is missing, so that one answer tells of both files."""
    config: dict[str, Any] | None = None
    kind = ""
    if config_name in names:
        try:
            config = read_json_object(folder / config_name, max_bytes=cap_of(config_name))
            kind = "" if config_name == SPARSE_CONFIG else peft_type_of(config, config_name)
        except AdapterInvalid as error:
            findings.extend(error)
            config = None
    if tensors_name not in names:
        return None
    try:
        with TensorFile(folder / tensors_name, max_bytes=MAX_TENSOR_FILE_BYTES) as tensors:
            if config is None:
                return None
            own = Findings()
            if INITIAL_TENSORS in names:
                parsed = _parse_beside_initial(folder, kind, config, tensors, base, own)
            else:
                parsed = _parse_kind(kind, config, tensors, base, own, limits)
            own.raise_if_any()
            return parsed
    except AdapterInvalid as error:
        findings.extend(error)
        return None


def _parse_beside_initial(
    folder: Path, kind: str, config: Mapping[str, Any], tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    if kind != "LORA":
        findings.add("unexpected_file", INITIAL_TENSORS, kind or "another format", "initial factors of a PEFT LoRA")
        return None
    with TensorFile(folder / INITIAL_TENSORS, max_bytes=MAX_TENSOR_FILE_BYTES) as initial:
        return parse_peft_lora(config, PEFT_CONFIG, tensors, base, findings, initial)


def _parse_kind(
    kind: str,
    config: Mapping[str, Any],
    tensors: TensorFile,
    base: BaseSpec,
    findings: Findings,
    limits: ConversionLimits,
) -> ParsedAdapter | None:
    if not kind:
        return parse_own(config, tensors, base, findings)
    if kind in READERS:
        return read_kind(READERS[kind], config, PEFT_CONFIG, tensors, base, findings, limits)
    if kind in PREFIX_KINDS:
        return parse_peft_prefix(kind, config, PEFT_CONFIG, tensors, base, findings)
    if kind == "LORA":
        return parse_peft_lora(config, PEFT_CONFIG, tensors, base, findings, max_flops=limits.max_flops)
    return PARSERS[kind](config, PEFT_CONFIG, tensors, base, findings)


def _list_files(folder: Path, findings: Findings) -> tuple[set[str], tuple[str, ...]]:
    """Names that will be read, and names that are skipped; whatever else lies there is a reason."""
    names: set[str] = set()
    skipped: list[str] = []
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            if count >= MAX_FILES:
                findings.add("unexpected_file", "files", f"more than {MAX_FILES}", f"at most {MAX_FILES} files")
                break
            role = role_of(entry.name)
            if not entry.is_file(follow_symlinks=False):
                findings.add("not_a_regular_file", entry.name, "a folder, link or device", "regular files")
            elif role in REFUSALS:
                code, allowed = REFUSALS[role]
                findings.add(code, entry.name, entry.name, allowed)
            elif role is FileRole.SKIPPED:
                skipped.append(entry.name)
            else:
                names.add(entry.name)
    return names, tuple(sorted(skipped))
