"""Which base a command works on: the embedded one, or the folder that ``--model`` names."""

from __future__ import annotations

from pathlib import Path

from deltaserve import tinybase
from deltaserve.errors import ConfigError


def base_folder(model: str | None) -> Path:
    """The checkpoint folder; raises ``ConfigError`` when ``model`` is not a folder with a config.json."""
    if model is None:
        return tinybase.CHECKPOINT
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {model}: no folder with a config.json; give the path of a checkpoint folder.")
    return folder


def base_name(model: str | None) -> str:
    """The base's own name: what adapters trained here will call it."""
    return tinybase.NAME if model is None else base_folder(model).resolve().name
