"""The files of the project's own formats: how they are written, and what all share when they are read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

from safetensors.torch import save_file
from torch import Tensor

from deltaserve_store.file_names import SPARSE_CONFIG, SPARSE_TENSORS
from deltaserve_store.findings import Findings
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, check_dtype, check_shape
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.names import NAME
from deltaserve_store.parsed import Delta, Kind, ParsedAdapter
from deltaserve_store.spec import BaseSpec

FORMAT_VERSION = 1
MAX_STOP_TOKENS = 16
FINGERPRINT = re.compile(r"[A-Za-z0-9:._-]{1,128}")
BY_FILE = f"by {SPARSE_CONFIG} and the base"
NO_DTYPES: Mapping[str, tuple[str, ...]] = MappingProxyType({})
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


class Told(TypedDict, total=False):
    """What every writer may be told to say beside the deltas, as keywords; see ``write_files``."""

    base_name: str | None
    method: str | None
    chat_template: str | None
    stop_token_ids: Sequence[int]


def write_files(
    folder: Path,
    format_name: str,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, Any],
    base_fingerprint: str,
    *,
    base_name: str | None = None,
    method: str | None = None,
    chat_template: str | None = None,
    stop_token_ids: Sequence[int] = (),
) -> None:
    """``adapter.safetensors`` and ``adapter.json`` into ``folder``, made if missing. Raises ``ValueError`` where no
    module is given."""
    if not modules:
        raise ValueError("no delta has a tensor; there is nothing to write")
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
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / SPARSE_TENSORS)
    (folder / SPARSE_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def parsed_file(
    config: Mapping[str, Any],
    kinds: Sequence[Kind],
    deltas: Iterable[Delta],
    *,
    num_parameters: int,
    rank: int | None = None,
) -> ParsedAdapter:
    """The adapter of a config in which ``modules_of`` found nothing wrong."""
    return ParsedAdapter(
        kind=kinds[0],
        more_kinds=tuple(kinds[1:]),
        file_format=config["format"],
        deltas=tuple(deltas),
        config=config,
        base_name=config.get("base_name"),
        base_fingerprint=config["base_fingerprint"],
        rank=rank,
        num_parameters=num_parameters,
        chat_template=config.get("chat_template"),
        stop_token_ids=tuple(config.get("stop_token_ids") or ()),
    )


def modules_of(
    config: Mapping[str, Any], fields: Mapping[str, str], format_name: str, base: BaseSpec, findings: Findings
) -> dict[str, Any]:
    """The field ``modules``, what it holds unchecked, after a check of all others; empty, with a finding, where it is
    no object or an empty one."""
    _check_shared(config, fields, format_name, base, findings)
    modules = config.get("modules", {})
    if not isinstance(modules, dict):
        findings.add("invalid_value", f"{SPARSE_CONFIG}:modules", modules, fields["modules"])
        return {}
    if not modules and "modules" in config:
        findings.add("target_not_found", f"{SPARSE_CONFIG}:modules", modules, fields["modules"])
    return modules


def _check_shared(
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


def check_listed(
    shapes: Mapping[str, tuple[int, ...]],
    tensors: TensorFile,
    findings: Findings,
    *,
    why: str,
    allowed: str,
    noun: str = "module",
    dtypes: Mapping[str, tuple[str, ...]] = NO_DTYPES,
) -> None:
    """Every tensor is there in its shape, which it has for the reason ``why``, and no other one is.

    ``dtypes``: by the last part of a name; of others floating point. ``allowed`` and ``noun`` are for the text about
    a tensor that nothing lists.
    """
    for name, shape in shapes.items():
        info = tensors.header.tensors.get(name)
        if info is None:
            findings.add("missing_tensor", name, "nothing", f"{list(shape)} by {SPARSE_CONFIG}")
            continue
        check_dtype(info, dtypes.get(name.rpartition(".")[2], FLOAT_DTYPES), findings)
        check_shape(info, shape, why, findings)
    for name in tensors.header.tensors:
        if name not in shapes:
            findings.add("unexpected_tensor", name, f"a tensor of no listed {noun}", allowed)


def is_one_of(values: Any, allowed: Collection[str]) -> bool:
    """Whether this is a list of some of the allowed words, each once, and at least one."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(value, str) and value in allowed for value in values)
        and len(set(values)) == len(values)
    )
