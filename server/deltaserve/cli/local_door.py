"""The door inside this process, for stores that no server holds: base and engine are built, used and given back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from deltaserve.admission.folders import COPY_BYTES, LocalDoor, RemoteDoor, adapter_files
from deltaserve.admission.importer import Verdict, import_folders
from deltaserve.api.adapter_view import adapter_view
from deltaserve.cli.base_choice import base_folder
from deltaserve.config import ServeConfig
from deltaserve.remote import RemoteServer, upload_files
from deltaserve.runtime import Runtime
from deltaserve_store.staging import Staging


@asynccontextmanager
async def runtime_here(store: Path, model: str | None) -> AsyncIterator[Runtime]:
    """A runtime without HTTP on the given store and base."""
    folder = None if model is None else str(base_folder(model))
    runtime = Runtime.open(ServeConfig(model=folder, store=store, demo_adapters=False, drain_seconds=0.0))
    try:
        await runtime.start()
        yield runtime
    finally:
        await runtime.close()


async def admit_here(path: Path, name: str, store: Path, model: str | None, **options: Any) -> dict[str, Any]:
    """One folder or archive through the door of a runtime made for it; ``options`` as for ``Admission.admit``."""
    async with runtime_here(store, model) as runtime:
        return await admit_into(runtime, path, name, source="cli", **options)


async def admit_into(runtime: Runtime, path: Path, name: str, *, source: str, **options: Any) -> dict[str, Any]:
    """Stage a folder or an archive and take it through the door of ``runtime``."""
    ((field, _), *_) = upload_files(path)
    with Staging(runtime.store).open() as staged:
        if field == "archive":
            staged.unpack(path)
        else:
            for file in adapter_files(path)[0]:
                with file.open("rb") as source_file:
                    staged.write(file.name, iter(partial(source_file.read, COPY_BYTES), b""))
        result = await runtime.admission.admit(staged.folder, name=name, source=source, **options)
    view = adapter_view(result.record, None, runtime.base_names[0])
    return {**view, "created": result.created, "warnings": list(result.warnings)}


async def import_here(
    directory: Path,
    store: Path,
    model: str | None,
    *,
    prefix: str = "",
    accept_base: bool = False,
    accept_no_effect: bool = False,
) -> AsyncIterator[Verdict]:
    """Many folders through the door of one runtime."""
    async with runtime_here(store, model) as runtime:
        door = LocalDoor(runtime.admission, runtime.store, accept_base=accept_base, accept_no_effect=accept_no_effect)
        async for verdict in import_folders(directory, door, prefix=prefix):
            yield verdict


def import_there(
    server: RemoteServer,
    directory: Path,
    *,
    prefix: str = "",
    accept_base: bool = False,
    accept_no_effect: bool = False,
) -> AsyncIterator[Verdict]:
    """Many folders through the door of a running server."""
    door = RemoteDoor(server, accept_base=accept_base, accept_no_effect=accept_no_effect)
    return import_folders(directory, door, prefix=prefix)
