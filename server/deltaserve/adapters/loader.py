"""Where the folded form of a version comes from. Runs on residency's worker threads, never on the step loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from deltaserve.deltas.folded import FoldedAdapter, FoldedFileInvalid
from deltaserve_store.spec import BaseSpec

CANDIDATE_PREFIX = "candidate:"
"""Versions not published yet live under this prefix, so that proving a version and serving it never mix."""


class NotPrepared(Exception):
    """No folded file for this base, dtype and fold version; the version must be folded and proven first."""


class FoldedLoader:
    """Reads folded files. ``locate(version)`` gives the path of a version's folded file, None when there is none.

    Candidates (``register``) are read from the path given for them.
    """

    def __init__(self, spec: BaseSpec, dtype: torch.dtype, locate: Callable[[str], Path | None]) -> None:
        self._spec = spec
        self._dtype = dtype
        self._locate = locate
        self._candidates: dict[str, Path] = {}
        self._lock = threading.Lock()

    def register(self, version: str, path: Path) -> None:
        """Make ``candidate:<version>`` loadable from ``path``."""
        with self._lock:
            self._candidates[CANDIDATE_PREFIX + version] = path

    def unregister(self, version: str) -> None:
        with self._lock:
            self._candidates.pop(CANDIDATE_PREFIX + version, None)

    def has_candidate(self, version: str) -> bool:
        with self._lock:
            return CANDIDATE_PREFIX + version in self._candidates

    def load(self, version: str) -> FoldedAdapter:
        """Read and verify. Raises ``NotPrepared``, or any other error of reading (the version's failure reason)."""
        with self._lock:
            candidate = self._candidates.get(version)
        if version.startswith(CANDIDATE_PREFIX):
            if candidate is None:
                raise LookupError("the candidate is no longer registered")
            return FoldedAdapter.load(candidate, self._spec, self._dtype)
        path = self._locate(version)
        if path is None:
            raise NotPrepared("the version has no folded file for this base and dtype")
        try:
            return FoldedAdapter.load(path, self._spec, self._dtype)
        except (FoldedFileInvalid, FileNotFoundError) as error:
            raise NotPrepared(str(error)) from error
