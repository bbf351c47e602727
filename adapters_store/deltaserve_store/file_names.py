"""Which file names an upload may hold, and what becomes of each. Names are flat; nothing else is ever written."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

MB = 1 << 20

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
INITIAL_TENSORS = "initial_model.safetensors"
SPARSE_CONFIG = "adapter.json"
SPARSE_TENSORS = "adapter.safetensors"
ADDED_TOKENS = "added_tokens.json"
TOKENIZER = "tokenizer.json"
TOKEN_LIST = "tokens.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

MAX_JSON_BYTES = 1 * MB
MAX_TOKENIZER_JSON_BYTES = 8 * MB
MAX_TOKENIZER_BYTES = 64 * MB
MAX_TENSOR_FILE_BYTES = 2048 * MB


class FileRole(StrEnum):
    """``STORED``: part of the version. ``CHECKED``: read for what it tells, not stored. ``SKIPPED``: reported, dropped
    unread. ``PICKLE``, ``ARCHIVE``, ``UNKNOWN``: refused.
    """

    STORED = "stored"
    CHECKED = "checked"
    SKIPPED = "skipped"
    PICKLE = "pickle"
    ARCHIVE = "archive"
    UNKNOWN = "unknown"


STORED_FILES: Mapping[str, int] = MappingProxyType(
    {
        PEFT_CONFIG: MAX_JSON_BYTES,
        PEFT_TENSORS: MAX_TENSOR_FILE_BYTES,
        INITIAL_TENSORS: MAX_TENSOR_FILE_BYTES,
        SPARSE_CONFIG: MAX_JSON_BYTES,
        SPARSE_TENSORS: MAX_TENSOR_FILE_BYTES,
        TOKEN_LIST: MAX_JSON_BYTES,
    }
)
"""Name to cap in bytes."""

CHECKED_FILES: Mapping[str, int] = MappingProxyType(
    {
        ADDED_TOKENS: MAX_TOKENIZER_JSON_BYTES,
        TOKENIZER: MAX_TOKENIZER_BYTES,
        TOKENIZER_CONFIG: MAX_TOKENIZER_JSON_BYTES,
    }
)

_SKIPPED = frozenset(
    [
        ".DS_Store",
        ".gitattributes",
        ".gitignore",
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "README.md",
        "USE_POLICY.md",
        "all_results.json",
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "eval_results.json",
        "generation_config.json",
        "manifest.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "train_results.json",
        "trainer_log.jsonl",
        "trainer_state.json",
        "training.log",
        "training_args.json",
        "vocab.json",
    ]
)
_SKIPPED_SUFFIXES = (".md", ".png", ".svg", ".log", ".csv")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".dill")
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")


def role_of(name: str) -> FileRole:
    """The role of a flat file name; exact spelling decides, so a case twin of an allowed name is ``UNKNOWN``."""
    if name in STORED_FILES:
        return FileRole.STORED
    if name in CHECKED_FILES:
        return FileRole.CHECKED
    if name in _SKIPPED:
        return FileRole.SKIPPED
    lower = name.lower()
    if lower.endswith(_PICKLE_SUFFIXES):
        return FileRole.PICKLE
    if lower.endswith(_ARCHIVE_SUFFIXES):
        return FileRole.ARCHIVE
    if lower.endswith(_SKIPPED_SUFFIXES) and "/" not in name and "\\" not in name and name.isprintable():
        return FileRole.SKIPPED
    return FileRole.UNKNOWN


REFUSALS: Mapping[FileRole, tuple[str, str]] = MappingProxyType(
    {
        FileRole.PICKLE: ("pickle_refused", "safetensors files; pickles are never opened"),
        FileRole.ARCHIVE: ("nested_archive", "plain files, one archive around them"),
        FileRole.UNKNOWN: ("unexpected_file", f"{', '.join(STORED_FILES)}"),
    }
)
"""Role to (reason code, what is allowed) for the roles that refuse an upload."""


def cap_of(name: str) -> int:
    """Most bytes a file of that name may have; skipped files are bounded by the cap of the whole upload."""
    return STORED_FILES.get(name) or CHECKED_FILES.get(name) or 64 * MB
