"""The files of the project's own formats: how they are written, and the fields of ``adapter.json`` that all share."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from deltaserve_store.file_names import SPARSE_CONFIG, SPARSE_TENSORS
from deltaserve_store.findings import Findings
from deltaserve_store.names import NAME
from deltaserve_store.spec import BaseSpec

FORMAT_VERSION = 1
MAX_STOP_TOKENS = 16
FINGERPRINT = re.compile(r"[A-Za-z0-9:._-]{1,128}")
REQUIRED = ("format", "format_version", "base_fingerprint", "modules")


def fields_of(format_name: str, modules: str) -> dict[str, str]:
    """Every field of ``adapter.json`` with what is allowed; others are refused."""
    return {
        "format": f'"{format_name}"',
        "format_version": str(FORMAT_VERSION),
        "base_fingerprint": "the fingerprint of the base, as GET /version shows it",
        "modules": modules,
        "base_name": "optional: null or a string; descriptive",
        "method": "optional: null or a string, how the adapter was made; descriptive",
        "chat_template": "optional: null or the name of a template that the operator registered",
        "stop_token_ids": f"optional: at most {MAX_STOP_TOKENS} token ids of the base",
    }


def write_files(
    folder: Path,
    format_name: str,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, Any],
    base_fingerprint: str,
    *,
    base_name: str | None,
    method: str | None,
    chat_template: str | None,
    stop_token_ids: Sequence[int],
) -> None:
    """``adapter.safetensors`` and ``adapter.json`` into ``folder``, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / SPARSE_TENSORS)
    config: dict[str, Any] = {
        "format": format_name,
        "format_version": FORMAT_VERSION,
        "base_fingerprint": base_fingerprint,
        "base_name": base_name,
        "method": method,
        "modules": dict(modules),
        "chat_template": chat_template,
        "stop_token_ids": list(stop_token_ids),
    }
    (folder / SPARSE_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def modules_of(config: Mapping[str, Any], fields: Mapping[str, str], findings: Findings) -> dict[str, Any]:
    """The field ``modules``, what it holds unchecked; empty, with a finding, where it is no object or an empty one."""
    modules = config.get("modules", {})
    if not isinstance(modules, dict):
        findings.add("invalid_value", f"{SPARSE_CONFIG}:modules", modules, fields["modules"])
        return {}
    if not modules and "modules" in config:
        findings.add("target_not_found", f"{SPARSE_CONFIG}:modules", modules, fields["modules"])
    return modules


def check_shared(
    config: Mapping[str, Any], fields: Mapping[str, str], format_name: str, base: BaseSpec, findings: Findings
) -> None:
    """Everything but ``modules``."""

    def refuse(code: str, field: str) -> None:
        found = config.get(field, "nothing")
        findings.add(code, f"{SPARSE_CONFIG}:{field}", found, fields.get(field, "only documented fields"))

    for field in config:
        if field not in fields:
            refuse("unknown_field", field)
    for field in REQUIRED:
        if field not in config:
            refuse("missing_field", field)
    if config.get("format", format_name) != format_name:
        refuse("unsupported_kind", "format")
    version = config.get("format_version", FORMAT_VERSION)
    if type(version) is not int or version != FORMAT_VERSION:
        refuse("invalid_value", "format_version")
    fingerprint = config.get("base_fingerprint", base.fingerprint)
    if not isinstance(fingerprint, str) or FINGERPRINT.fullmatch(fingerprint) is None:
        refuse("invalid_value", "base_fingerprint")
    elif fingerprint != base.fingerprint:
        findings.add("base_mismatch", f"{SPARSE_CONFIG}:base_fingerprint", fingerprint, base.fingerprint)
    for field in ("base_name", "method"):
        value = config.get(field)
        if value is not None and not (isinstance(value, str) and len(value) <= 1024):
            refuse("invalid_value", field)
    template = config.get("chat_template")
    if template is not None and not (isinstance(template, str) and NAME.fullmatch(template)):
        refuse("invalid_value", "chat_template")
    if not _are_stops(config.get("stop_token_ids"), base.vocab_size):
        refuse("invalid_value", "stop_token_ids")


def _are_stops(stops: Any, vocab_size: int) -> bool:
    if stops is None:
        return True
    return (
        isinstance(stops, list)
        and len(stops) <= MAX_STOP_TOKENS
        and all(type(stop) is int and 0 <= stop < vocab_size for stop in stops)
    )


def is_one_of(values: Any, allowed: Collection[str]) -> bool:
    """Whether this is a list of some of the allowed words, each once, and at least one."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(value, str) and value in allowed for value in values)
        and len(set(values)) == len(values)
    )
