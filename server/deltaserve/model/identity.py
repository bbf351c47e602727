"""Who a base is: a fingerprint over its bytes, the names it is known by, how many tokens its tokenizer has.

Reading gigabytes of weights for every start would be slow, so the digest of each weight file is kept in a user cache,
keyed by path and valid for one size, modification time and inode. Nothing is written into the model folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Fields that differ between copies of one base without changing what it computes.
_VOLATILE_FIELDS = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype", "_commit_hash"})
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def fingerprint(folder: Path, raw_config: dict[str, Any], weights: Sequence[Path], cache_dir: Path | None) -> str:
    """sha256 (hex) over configuration, weight files, tokenizer files and chat template of a base.

    ``weights`` is empty for a base with random weights, which is told apart by a marker.
    """
    config = {key: value for key, value in raw_config.items() if key not in _VOLATILE_FIELDS}
    parts = [("config", hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest())]
    parts += [(file.name, _cached_digest(file, cache_dir)) for file in weights] or [("weights", "dummy")]
    parts += [(name, _digest(folder / name)) for name in _TEXT_FILES if (folder / name).is_file()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def known_names(folder: Path, raw_config: dict[str, Any]) -> tuple[str, ...]:
    """The folder's name, then the name the checkpoint was saved under, if that is another."""
    recorded = raw_config.get("_name_or_path")
    names = [folder.resolve().name, *([recorded] if isinstance(recorded, str) and recorded else [])]
    return tuple(dict.fromkeys(names))


def count_tokens(folder: Path) -> int | None:
    """Tokens of ``tokenizer.json``, added ones included; None where there is no such file."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    return int(Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cached_digest(file: Path, cache_dir: Path | None) -> str:
    cache_dir = Path.home() / ".cache" / "deltaserve" / "weights" if cache_dir is None else cache_dir
    stat = file.stat()
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    entry = cache_dir / (hashlib.sha256(str(file.resolve()).encode()).hexdigest() + ".json")
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["state"] == state and isinstance(known["sha256"], str):
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = _digest(file)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = entry.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps({"state": state, "sha256": digest}), encoding="utf-8")
        partial.replace(entry)
    except OSError as error:
        logger.info("the digest of the weights could not be kept and will be computed again: %s", error)
    return digest
