"""The version of an adapter: a digest of its meaning-carrying bytes.

SHA-256 over length-tagged parts, so that no two different adapters run into the same byte string: a label, the file
names, the canonical config, then per tensor in order of name its name, dtype, shape and bytes; a second tensor file
follows with its name, and so does the list of added tokens, where there is one. Canonical means: keys sorted, and the
lists that PEFT writes in random set order sorted; the keys of ``rank_pattern`` and ``alpha_pattern`` keep their order,
because the first match wins. Header metadata, JSON white space and the order of tensors in the file do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaserve_store.file_names import (
    INITIAL_TENSORS,
    MAX_TENSOR_FILE_BYTES,
    PEFT_CONFIG,
    PEFT_TENSORS,
    SPARSE_CONFIG,
    SPARSE_TENSORS,
    TOKEN_LIST,
    cap_of,
)
from deltaserve_store.formats.json_file import read_json_object
from deltaserve_store.formats.tensor_file import TensorFile

LABEL = b"deltaserve-version-1"
_SETS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform")
_ORDERED = ("rank_pattern", "alpha_pattern")


def adapter_file_names(folder: Path) -> tuple[str, ...]:
    """Config and tensor file of the format that lies in ``folder``, and the initial factors where they are there."""
    if (folder / SPARSE_CONFIG).exists():
        return SPARSE_CONFIG, SPARSE_TENSORS
    initial = (INITIAL_TENSORS,) if (folder / INITIAL_TENSORS).exists() else ()
    return PEFT_CONFIG, PEFT_TENSORS, *initial


def stored_file_names(folder: Path) -> tuple[str, ...]:
    """The files of ``folder`` that make the version: config and tensors, and the tokens that they add."""
    names = adapter_file_names(folder)
    return (*names, TOKEN_LIST) if (folder / TOKEN_LIST).exists() else names


def content_digest(folder: Path) -> str:
    """The version (64 lowercase hex digits) of the adapter files in ``folder``; raises ``AdapterInvalid`` for files
    that cannot be read.
    """
    config_name, tensors_name, *more = adapter_file_names(folder)
    config = read_json_object(folder / config_name, max_bytes=cap_of(config_name))
    digest = hashlib.sha256()

    def part(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    def tensors_of(file_name: str) -> None:
        with TensorFile(folder / file_name, max_bytes=MAX_TENSOR_FILE_BYTES) as tensors:
            for name in sorted(tensors.header.tensors):
                info = tensors.header.tensors[name]
                part(f"{name} {info.dtype} {list(info.shape)}".encode())
                digest.update((info.stop - info.start).to_bytes(8, "little"))
                for chunk in tensors.chunks(name):
                    digest.update(chunk)

    part(LABEL)
    part(config_name.encode())
    part(canonical_config(config))
    tensors_of(tensors_name)
    for file_name in more:
        part(file_name.encode())
        tensors_of(file_name)
    if (folder / TOKEN_LIST).exists():  # adapters without one keep the digest they had
        part(TOKEN_LIST.encode())
        part(canonical_config(read_json_object(folder / TOKEN_LIST, max_bytes=cap_of(TOKEN_LIST))))
    return digest.hexdigest()


def canonical_config(config: Mapping[str, Any]) -> bytes:
    """The config as bytes that are equal for configs of equal meaning."""
    canonical = dict(config)
    for field in _SETS:
        if isinstance(canonical.get(field), list):
            canonical[field] = sorted(canonical[field], key=str)
    for field in _ORDERED:
        if isinstance(canonical.get(field), dict):
            canonical[field] = list(canonical[field].items())
    return json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
