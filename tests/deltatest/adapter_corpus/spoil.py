"""A bad adapter as a case: the good one it starts from, the one bad thing that is done, the refusal it must meet."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deltatest.adapter_corpus.good import CONFIG, GOOD, TENSORS


@dataclass(frozen=True)
class BadAdapter:
    """``spoil`` makes a good adapter bad; the refusal must name exactly ``reasons`` as (code, where) pairs, unless
    ``is_exact`` is off: then at least those. ``good`` makes the good adapter, by default that of ``kind``.
    """

    name: str
    kind: str
    spoil: Callable[[Path], None]
    reasons: tuple[tuple[str, str], ...]
    is_exact: bool = True
    good: Callable[[Path], Path] | None = None

    def write(self, folder: Path) -> Path:
        (self.good or GOOD[self.kind])(folder)
        self.spoil(folder)
        return folder


# What a case does to a folder


def edit_config(name: str = CONFIG, **changes: Any) -> Callable[[Path], None]:
    """Sets fields of a JSON file; ``...`` removes one."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        config.update({key: value for key, value in changes.items() if value is not ...})
        for key in [key for key, value in changes.items() if value is ...]:
            config.pop(key)
        (folder / name).write_text(json.dumps(config))

    return spoil


def edit_tensors(changes: dict[str, Any], name: str = TENSORS) -> Callable[[Path], None]:
    """Replaces tensors; a value may be a function of the old tensor, None removes."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        for key, value in changes.items():
            if value is None:
                del tensors[key]
            else:
                tensors[key] = value(tensors[key]) if callable(value) else value
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)

    return spoil


def write_file(name: str, data: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return spoil


def edit_bytes(change: Callable[[bytes], bytes], name: str = TENSORS) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def edit_header(change: Callable[[dict[str, Any]], Any], name: str = TENSORS) -> Callable[[Path], None]:
    """Changes the safetensors header; the data stays as it is."""

    def edit(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        header = change(header) or header
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return edit_bytes(edit, name)


def set_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


def config_case(
    field: str, value: Any, code: str, *, kind: str = "lora", name: str = "", is_exact: bool = True
) -> BadAdapter:
    """A case that sets one config field."""
    shown = name or f"{field}={json.dumps(value)[:40]}"
    return BadAdapter(
        f"config {shown}", kind, edit_config(**{field: value}), ((code, f"{CONFIG}:{field}"),), is_exact=is_exact
    )


def tensor_case(
    name: str, code: str, changes: dict[str, Any], where: str, *, kind: str = "lora", file: str = TENSORS
) -> BadAdapter:
    return BadAdapter(name, kind, edit_tensors(changes, file), ((code, where),))
