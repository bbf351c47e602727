"""The files of an adapter that adds tokens: a list of these stands for the tokenizer's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deltaserve_store.digest import adapter_file_names
from deltaserve_store.file_names import TOKEN_LIST
from deltaserve_store.formats.token_list import write_token_list
from deltaserve_store.parsed import ParsedAdapter


def with_token_list(staged: Path, adapter: ParsedAdapter, scratch: Path) -> Path:
    """The folder whose files make the version: ``staged``, or with added tokens the empty folder ``scratch``, which
    gets the adapter's files and the list of tokens that stands for the tokenizer's."""
    if not adapter.added_tokens:
        return staged
    for name in adapter_file_names(staged):
        try:
            os.link(staged / name, scratch / name, follow_symlinks=False)
        except OSError:  # on another file system
            shutil.copyfile(staged / name, scratch / name, follow_symlinks=False)
    (scratch / TOKEN_LIST).write_bytes(write_token_list(adapter.added_tokens))
    return scratch
