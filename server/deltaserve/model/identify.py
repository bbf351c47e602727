"""The fingerprint of a base without loading it: what a trainer writes into an adapter's files."""

from __future__ import annotations

from pathlib import Path

from deltaserve.model import checkpoint, identity


def identify(folder: Path, *, cache_dir: Path | None = None) -> str:
    """The same fingerprint that ``load_base`` gives this folder. Raises ``UnsupportedBase`` for an unusable one."""
    raw = checkpoint.read_raw_config(folder)
    return identity.fingerprint(folder, raw, checkpoint.weight_files(folder), cache_dir)
