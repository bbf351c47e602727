"""Bytes of a folded adapter on disk: one ordinary safetensors file whose tensors all start on 64-byte boundaries.

Layout (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header, the data. The
header is padded with spaces, and ``U8`` tensors named ``pad.<n>`` fill the gaps, so that every tensor's file offset is
a multiple of ``ALIGNMENT`` and a loaded view can be handed to vector code or copied to a device without a repack.
The header's metadata carries the SHA-256 of everything else in header and data, so that a damaged file is found before
it is served.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ALIGNMENT = 64  # a cache line: rows that begin inside one cost the operators an extra line each
MAX_HEADER_BYTES = 64 * 1024 * 1024

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


class FileDamaged(Exception):
    """The file is not what ``write_tensors`` wrote; the message says which check failed. Never names a path."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically: a temporary neighbour is filled, flushed to the disk and renamed over ``path``.

    ``tensors`` are CPU tensors of float32, float16, bfloat16 or int32. Raises ``OSError`` as the disk does.
    """
    header: dict[str, Any] = {}
    chunks: list[bytes | memoryview] = []
    offset = 0
    for name, tensor in tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        chunks.append(data)
        offset += len(data)
        if padding := -offset % ALIGNMENT:
            header[f"pad.{len(header)}"] = {
                "dtype": "U8",
                "shape": [padding],
                "data_offsets": [offset, offset + padding],
            }
            chunks.append(bytes(padding))
            offset += padding
    header["__metadata__"] = dict(metadata)
    digest = hashlib.sha256(_encode(header))
    for chunk in chunks:
        digest.update(chunk)
    header["__metadata__"]["sha256"] = digest.hexdigest()
    encoded = _encode(header)
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)))
            file.write(encoded)
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_tensors(path: Path, *, mmap: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read tensors (views of one buffer, nothing is copied) and metadata; padding is left out.

    ``mmap`` maps the file privately instead of reading it: pages come in on first use, but a file that changes
    afterwards changes the tensors, so use it for short-lived reads only. Raises ``FileDamaged`` or ``OSError``.
    """
    size = path.stat().st_size
    if size < 8 + ALIGNMENT:
        raise FileDamaged(f"the file holds {size} bytes, too few for a header")
    if mmap:
        buffer = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    else:
        buffer = _aligned(size)
        with path.open("rb") as file:
            if file.readinto(buffer.numpy().data) != size:
                raise FileDamaged("the file shrank while it was read")
    raw = buffer.numpy().data
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise FileDamaged(f"the header claims {header_bytes} bytes in a file of {size}")
    try:
        header = json.loads(bytes(raw[8 : 8 + header_bytes]))
        expected = header["__metadata__"].pop("sha256")
        digest = hashlib.sha256(_encode(header))
        digest.update(raw[8 + header_bytes :])
        if digest.hexdigest() != expected:
            raise FileDamaged("the content does not match its SHA-256")
        metadata = header.pop("__metadata__")
        data = buffer[8 + header_bytes :]
        tensors = {
            name: _view(data, entry["dtype"], entry["shape"], *entry["data_offsets"])
            for name, entry in header.items()
            if entry["dtype"] != "U8"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise FileDamaged(f"the header is not readable ({type(error).__name__})") from error
    return tensors, metadata


def _aligned(size: int) -> torch.Tensor:
    """uint8 [size] that begins on a boundary of ``ALIGNMENT`` in memory, as the file's tensors do in the file."""
    room = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT
    return room[start : start + size]


def _encode(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), sort_keys=True).encode()


def _view(data: torch.Tensor, dtype_name: str, shape: list[int], start: int, stop: int) -> torch.Tensor:
    """View bytes ``[start, stop)`` as a tensor; a shape that does not fill them raises ``RuntimeError``."""
    if not 0 <= start <= stop <= data.numel():
        raise ValueError("tensor outside the data")
    return data[start:stop].view(_DTYPES[dtype_name]).view(shape)
