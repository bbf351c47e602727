"""Folded files and evidence beside the stored versions: what is proven for this server, and where it lies."""

from __future__ import annotations

from pathlib import Path

import torch

from deltaserve.admission.evidence import Evidence, ProofKey
from deltaserve.deltas.fold import fold_key
from deltaserve.deltas.folded import FOLD_VERSION, FOLDED_FILE_NAME, FoldedAdapter, FoldedFileInvalid, dtype_name
from deltaserve_store.spec import BaseSpec
from deltaserve_store.store import AdapterStore


class ProvenFiles:
    """The derived files of one store for one server (base, dtype, device kind, operators).

    A folded file counts only together with evidence for the same key. ``locate`` is what the engine loads from; it may
    be called from any thread.
    """

    def __init__(
        self, store: AdapterStore, *, base_fingerprint: str, dtype: torch.dtype, device: str, operators: str
    ) -> None:
        self.key = ProofKey(base_fingerprint, dtype_name(dtype), device, operators, FOLD_VERSION)
        self._store = store
        self._folder_key = fold_key(base_fingerprint, dtype)

    def locate(self, version: str) -> Path | None:
        """The folded file of a version that is proven for this server; None when it has to be prepared first."""
        if self.evidence(version) is None:
            return None
        path = self._store.derived_dir(version, self._folder_key) / FOLDED_FILE_NAME
        return path if path.is_file() else None

    def evidence(self, version: str) -> Evidence | None:
        """What was measured under this server's key, within tolerance; None when there is nothing of the kind."""
        data = self._store.get_evidence(version, str(self.key))
        evidence = Evidence.from_dict(data) if data is not None else None
        return evidence if evidence is not None and evidence.is_within_tolerance else None

    def is_ready(self, version: str, spec: BaseSpec, dtype: torch.dtype) -> bool:
        """Whether the folded file is there, proven and undamaged; reads all of it."""
        path = self.locate(version)
        if path is None:
            return False
        try:
            FoldedAdapter.load(path, spec, dtype, mmap=True)
        except (FoldedFileInvalid, OSError):
            return False
        return True

    def place(self, version: str, folded: Path) -> None:
        """Move a proven folded file to where ``locate`` finds it. Raises ``OSError``."""
        folder = self._store.derived_dir(version, self._folder_key)
        folder.mkdir(parents=True, exist_ok=True)
        folded.replace(folder / FOLDED_FILE_NAME)

    def keep(self, version: str, folded: Path, evidence: Evidence) -> None:
        """``place`` the file and store its evidence. Raises ``OSError`` or ``StoreError``."""
        self.place(version, folded)
        self._store.put_evidence(version, str(self.key), evidence.to_dict())
