"""Safetensors headers from untrusted bytes, bounded before anything is allocated.

File format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [start, stop]}, "__metadata__": {str: str}}``, then the tensor bytes that
the offsets count from. The reference reader accepts any tensor name, sizes that only a zero keeps small, and hundreds
of thousands of entries; this one does not. Tensors without items are read (a linear pruned to rank 0 has some); whoever
does not expect them finds their shape wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve_store.errors import quote
from deltaserve_store.findings import Findings, refuse
from deltaserve_store.formats.json_file import parse_json_object

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 4
MAX_METADATA_ENTRIES = 64
PREFIX_BYTES = 8
MAX_SIZE = (1 << 31) - 1
ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I16": 2, "U8": 1}
"""Accepted dtypes with their size in bytes."""

TENSOR_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){0,510}")
_TENSOR_FIELDS = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """``start`` and ``stop`` are byte offsets in the file itself."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors by name, in the order of their bytes. ``metadata`` is never interpreted."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def header_length(prefix: bytes, file_bytes: int, where: str) -> int:
    """N of the first 8 bytes. Raises ``AdapterInvalid`` when N exceeds its cap or the file."""
    if len(prefix) < PREFIX_BYTES:
        raise refuse("bad_header", where, f"{file_bytes} bytes", "a safetensors file of at least 10 bytes")
    length = int.from_bytes(prefix, "little")
    if length > file_bytes - PREFIX_BYTES:
        raise refuse("bad_header", where, f"header length {length} in {file_bytes} bytes", "a header inside the file")
    if length > MAX_HEADER_BYTES:
        raise refuse("header_too_large", where, f"{length} bytes", f"at most {MAX_HEADER_BYTES} bytes")
    return length


def parse_header(data: bytes, file_bytes: int, where: str) -> Header:
    """Checks the N header bytes ``data`` of a file of ``file_bytes``; raises ``AdapterInvalid`` with all reasons."""
    if not data.startswith(b"{"):
        raise refuse("bad_header", where, data[:8], "a JSON object that begins with '{'")
    # A well-formed entry has at most six commas and three brackets.
    if data.count(b",") > 7 * MAX_TENSORS or data.count(b"{") > MAX_TENSORS + 2:
        raise refuse("header_too_large", where, "more entries than allowed", f"at most {MAX_TENSORS} tensors")
    entries = parse_json_object(data, where, code="bad_header")
    findings = Findings()
    metadata = _metadata(entries.pop("__metadata__", {}), where, findings)
    if len(entries) > MAX_TENSORS:
        raise refuse("header_too_large", where, f"{len(entries)} tensors", f"at most {MAX_TENSORS} tensors")
    if not entries:
        findings.add("bad_header", where, "no tensors", "at least one tensor")
    data_start = PREFIX_BYTES + len(data)
    tensors = [
        info for name, entry in entries.items() if (info := _tensor(name, entry, data_start, findings)) is not None
    ]
    if not findings:
        _check_layout(tensors, data_start, file_bytes, where, findings)
    findings.raise_if_any()
    return Header({info.name: info for info in sorted(tensors, key=lambda info: info.start)}, metadata)


def _metadata(value: Any, where: str, findings: Findings) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        findings.add("bad_header", f"{where}:__metadata__", type(value).__name__, "an object of strings")
        return {}
    if len(value) > MAX_METADATA_ENTRIES:
        findings.add("bad_header", f"{where}:__metadata__", len(value), f"at most {MAX_METADATA_ENTRIES} entries")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor(name: str, entry: Any, data_start: int, findings: Findings) -> TensorInfo | None:
    if TENSOR_NAME.fullmatch(name) is None:
        findings.add("bad_tensor_name", name, name, "a module path of letters, digits, '_', '-' and single dots")
        return None
    if not isinstance(entry, dict) or entry.keys() != _TENSOR_FIELDS:
        findings.add("bad_header", name, entry, "exactly dtype, shape and data_offsets")
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        findings.add("unsupported_dtype", name, dtype, ", ".join(ITEM_BYTES))
        return None
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        findings.add("bad_shape", name, shape, "a list of non-negative integers")
        return None
    if not 1 <= len(shape) <= MAX_DIMENSIONS or (0 in shape and max(shape) > MAX_SIZE):
        findings.add(
            "bad_shape", name, shape, f"1 to {MAX_DIMENSIONS} dimensions, beside a zero at most {MAX_SIZE} each"
        )
        return None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        findings.add("bad_offsets", name, offsets, "two non-negative integers")
        return None
    expected = ITEM_BYTES[dtype]
    for size in shape:
        expected *= size
    if offsets[1] - offsets[0] != expected:
        findings.add("bad_offsets", name, f"{offsets[1] - offsets[0]} bytes for {dtype} {shape}", f"{expected} bytes")
        return None
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _check_layout(tensors: list[TensorInfo], data_start: int, file_bytes: int, where: str, findings: Findings) -> None:
    """The tensors must tile the data exactly: no hole (smuggled bytes), no overlap, nothing after the end."""
    position = data_start
    for info in sorted(tensors, key=lambda info: (info.start, info.stop)):
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            findings.add("bad_offsets", info.name, what, f"data at byte {position} of {quote(where)}")
            return
        position = info.stop
    if position != file_bytes:
        findings.add("bad_offsets", where, f"{file_bytes} bytes", f"{position} bytes, as its tensors add up to")
