"""Which code the operators are: a digest of the package's source files, that tells results of one code from those of
another. Versions do not tell it: operators change between two releases, and in a checkout from one day to the next.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

SUFFIXES = (".py", ".cpp", ".inc")


@cache
def source_digest() -> str:
    """64 hex digits over names and contents of all source files: PyTorch definitions, C++ and Triton operators.

    The same for the same files wherever they are installed. Read once a process, some 400 KB.
    """
    return digest_of(Path(__file__).parent)


def digest_of(folder: Path) -> str:
    """The digest of the source files below ``folder``, by paths relative to it. Raises ``OSError``."""
    total = hashlib.sha256()
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in SUFFIXES}
    for name in sorted(names):
        content = names[name].read_bytes()
        # Lengths in front, so that no two trees run together into the same bytes.
        total.update(f"{len(name.encode())} {len(content)} {name}\n".encode() + content)
    return total.hexdigest()
