"""Strict JSON objects from untrusted bytes: bounded, UTF-8, no duplicate keys, no NaN, no lone surrogates."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from deltaserve_store.findings import refuse

MAX_DEPTH = 32
MAX_NODES = 500_000

# Possessive, and an unterminated string runs to the end: linear in the text whatever it holds.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def parse_json_object(data: bytes, where: str, *, code: str = "bad_json", max_nodes: int = MAX_NODES) -> dict[str, Any]:
    """The object in ``data``; raises ``AdapterInvalid`` with ``code`` for anything that two readers could read
    differently. ``where`` names the file in the reason.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(code, where, f"invalid UTF-8 at byte {error.start}", "UTF-8 text") from None
    _check_extent(text, where, code, max_nodes)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise refuse(code, where, "nesting too deep", f"at most {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise refuse(code, where, str(error), "one JSON object") from None
    if not isinstance(value, dict):
        raise refuse(code, where, type(value).__name__, "one JSON object")
    if "\\u" in text:
        # Only escapes can bring lone surrogates into decoded UTF-8; they break every later encode.
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise refuse(code, where, "a lone surrogate", "UTF-8 text") from None
    return value


def read_json_object(path: Path, *, max_bytes: int, max_nodes: int = MAX_NODES) -> dict[str, Any]:
    """Reads a regular file (never through a link) of at most ``max_bytes`` and parses it."""
    name = path.name
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise refuse("not_a_regular_file", name, error.strerror or "unreadable", "a regular file") from None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise refuse("file_too_large", name, f"more than {max_bytes} bytes", f"at most {max_bytes} bytes")
    return parse_json_object(data, name, max_nodes=max_nodes)


def _check_extent(text: str, where: str, code: str, max_nodes: int) -> None:
    """Bounds depth and size before Python objects are made of the text."""
    outside_strings = _STRING.sub("", text)
    if outside_strings.count(",") + outside_strings.count("[") + outside_strings.count("{") > max_nodes:
        raise refuse(code, where, "too many values", f"at most {max_nodes} values")
    depth = deepest = 0
    for bracket in _BRACKET.findall(outside_strings):
        if bracket in "[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    if deepest > MAX_DEPTH:
        raise refuse(code, where, f"{deepest} levels deep", f"at most {MAX_DEPTH} levels")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:80]!a}")
            seen.add(key)
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:40]} is out of range")
    return value
