"""Folders that users have on disk: which of their files make up the adapter, and the two doors they can go through."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from deltaserve.admission.door import Admission
from deltaserve.admission.failures import typed_failures
from deltaserve.errors import NotFound
from deltaserve_store.file_names import PEFT_TENSORS, SPARSE_TENSORS, FileRole, role_of
from deltaserve_store.names import DEFAULT_TENANT
from deltaserve_store.staging import StagedUpload, Staging
from deltaserve_store.store import AdapterStore

COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Admitted:
    """The outcome of one folder. ``effect`` is None where a server does not tell it."""

    version: str
    created: bool
    effect: float | None
    warnings: tuple[str, ...] = ()


class FolderDoor(Protocol):
    """Where folders go in: this process or a running server. Raises ``DeltaserveError``."""

    async def current_version(self, name: str) -> str | None: ...

    async def admit(self, files: Sequence[Path], name: str) -> Admitted: ...


def adapter_files(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """The files of ``folder`` to send, and the names left behind.

    Training runs leave optimizer states and the like beside an adapter; where the adapter's safetensors file is there,
    such files stay behind, unopened. Where it is not, everything is sent, so that the door can say what is wrong.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() or path.is_symlink())
    names = {path.name for path in files}
    if not names & {PEFT_TENSORS, SPARSE_TENSORS}:
        return files, ()
    sent = [path for path in files if role_of(path.name) in (FileRole.STORED, FileRole.CHECKED)]
    return sent, tuple(sorted(names - {path.name for path in sent}))


def _copy_into(staged: StagedUpload, file: Path) -> None:
    with file.open("rb") as source:
        staged.write(file.name, iter(partial(source.read, COPY_BYTES), b""))


class LocalDoor:
    """Stages files into the store's own staging area and admits them in this process."""

    def __init__(
        self,
        admission: Admission,
        store: AdapterStore,
        *,
        tenant: str = DEFAULT_TENANT,
        accept_base: bool = False,
        accept_no_effect: bool = False,
        source: str = "import",
    ) -> None:
        self._admission = admission
        self._store = store
        self._tenant = tenant
        self._accept_base = accept_base
        self._accept_no_effect = accept_no_effect
        self._source = source

    async def current_version(self, name: str) -> str | None:
        entry = self._store.snapshot().adapters.get(self._tenant, {}).get(name)
        return entry.current if entry else None

    async def admit(self, files: Sequence[Path], name: str) -> Admitted:
        with typed_failures(), Staging(self._store).open() as staged:
            for file in files:
                await asyncio.to_thread(_copy_into, staged, file)
            result = await self._admission.admit(
                staged.folder,
                name=name,
                tenant=self._tenant,
                accept_base=self._accept_base,
                accept_no_effect=self._accept_no_effect,
                source=self._source,
            )
        return Admitted(result.record.version, result.created, result.evidence.effect, result.warnings)


class UploadServer(Protocol):
    """The part of ``remote.RemoteServer`` that an import needs."""

    def show(self, name: str) -> dict[str, Any]: ...

    def upload(
        self, path: Sequence[Path], name: str, *, accept_base: bool = False, accept_no_effect: bool = False
    ) -> dict[str, Any]: ...


class RemoteDoor:
    """Uploads files to a running server."""

    def __init__(self, server: UploadServer, *, accept_base: bool = False, accept_no_effect: bool = False) -> None:
        self._server = server
        self._accept_base = accept_base
        self._accept_no_effect = accept_no_effect

    async def current_version(self, name: str) -> str | None:
        try:
            return str((await asyncio.to_thread(self._server.show, name))["version"])
        except NotFound:
            return None

    async def admit(self, files: Sequence[Path], name: str) -> Admitted:
        answer = await asyncio.to_thread(
            lambda: self._server.upload(
                files, name, accept_base=self._accept_base, accept_no_effect=self._accept_no_effect
            )
        )
        warnings = tuple(str(warning) for warning in answer.get("warnings", ()))
        return Admitted(str(answer["version"]), bool(answer["created"]), answer.get("effect"), warnings)
