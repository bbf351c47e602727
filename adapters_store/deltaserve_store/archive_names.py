"""Paths inside an uploaded archive, reduced to flat file names or refused."""

from __future__ import annotations

import re
import unicodedata

from deltaserve_store.file_names import REFUSALS, FileRole, role_of
from deltaserve_store.findings import Findings

_DRIVE = re.compile(r"[A-Za-z]:")


class ArchiveNames:
    """At most one folder level, the same for all entries; every flat name once, also when case is ignored.

    What macOS adds on its own (``__MACOSX/``, ``._name``) is passed over.
    """

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._prefix: str | None = None
        self._seen: set[str] = set()

    def accept_folder(self, path: str) -> None:
        """Checks the path of a folder entry; nothing is made of it."""
        self._parts(path)

    def accept_file(self, path: str) -> tuple[str, FileRole] | None:
        """The flat name and its role; None when the entry is refused (told to findings) or passed over."""
        parts = self._parts(path)
        if parts is None:
            return None
        if not parts or len(parts) > 2:
            self._findings.add(
                "archive_path", path, f"{len(parts)} levels", "files in the archive's root or one folder"
            )
            return None
        name = parts[-1]
        if parts[0] == "__MACOSX" or name.startswith("._"):
            return None
        prefix = parts[0] if len(parts) == 2 else ""
        if self._prefix is None:
            self._prefix = prefix
        if prefix != self._prefix:
            self._findings.add("archive_path", path, "another folder", "all files in one folder")
            return None
        twin = unicodedata.normalize("NFKC", name).casefold()
        if twin in self._seen:
            self._findings.add("duplicate_file", path, name, "each name once, whatever its case")
            return None
        self._seen.add(twin)
        role = role_of(name)
        if role in REFUSALS:
            code, allowed = REFUSALS[role]
            self._findings.add(code, path, name, allowed)
            return None
        return name, role

    def _parts(self, path: str) -> list[str] | None:
        fault = None
        if not path or not path.isprintable() or "\\" in path or len(path) > 512:
            fault = "an empty, overlong or unprintable path"
        elif path.startswith("/") or _DRIVE.match(path):
            fault = "an absolute path"
        elif ".." in path.split("/"):
            fault = "a path that leaves its folder"
        if fault:
            self._findings.add("archive_path", path or "(empty)", fault, "plain relative paths")
            return None
        return [part for part in path.split("/") if part not in ("", ".")]
