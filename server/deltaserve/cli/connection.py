"""Where an adapter command goes: to ``--server``, else to the server that holds the store, else to the store itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from deltaserve.api.adapter_view import adapter_view
from deltaserve.errors import Unavailable
from deltaserve.remote import RemoteServer
from deltaserve_store.errors import StoreLocked
from deltaserve_store.lock import LOCK_NAME, StoreLock
from deltaserve_store.manifest import AdapterRecord
from deltaserve_store.names import DEFAULT_TENANT
from deltaserve_store.store import AdapterStore


class Adapters(Protocol):
    """What commands do with adapters that are in already. Answers are the objects of ``docs/api.md``."""

    def list(self) -> Iterator[dict[str, Any]]: ...
    def show(self, name: str) -> dict[str, Any]: ...
    def versions(self, name: str) -> Sequence[dict[str, Any]]: ...
    def delete(self, name: str) -> dict[str, Any]: ...
    def rollback(self, name: str, version: str | None = None) -> dict[str, Any]: ...
    def alias(self, alias: str, target: str) -> dict[str, Any]: ...


class LocalAdapters:
    """A store of this machine that no server holds."""

    def __init__(self, store: AdapterStore) -> None:
        self.store = store

    def list(self) -> Iterator[dict[str, Any]]:
        after: str | None = None
        while page := self.store.list(DEFAULT_TENANT, after=after):
            yield from map(as_object, page)
            after = page[-1].name

    def show(self, name: str) -> dict[str, Any]:
        return as_object(self.store.get(DEFAULT_TENANT, name))

    def versions(self, name: str) -> Sequence[dict[str, Any]]:
        return [as_object(record) for record in self.store.versions(DEFAULT_TENANT, name)]

    def delete(self, name: str) -> dict[str, Any]:
        self.store.delete(DEFAULT_TENANT, name)
        return {"id": name, "deleted": True}

    def rollback(self, name: str, version: str | None = None) -> dict[str, Any]:
        return as_object(self.store.rollback(DEFAULT_TENANT, name, version))

    def alias(self, alias: str, target: str) -> dict[str, Any]:
        made = self.store.alias(DEFAULT_TENANT, alias, target)
        return {"id": alias, "target": made.target, "version": made.version}


def as_object(record: AdapterRecord) -> dict[str, Any]:
    """A stored record as HTTP would show it, where no engine runs."""
    return adapter_view(record, None, None)


@contextmanager
def adapters(server: str | None, store: Path, api_key: str | None) -> Iterator[Adapters]:
    """Opens what the command goes to. Raises ``Unavailable`` when the store's holder has not told its URL yet."""
    remote = find_server(server, store, api_key)
    if remote is not None:
        yield remote
        return
    AdapterStore.open(store, lock=False).close()  # "there is no store here" instead of making an empty one
    with AdapterStore.open(store) as opened:
        yield LocalAdapters(opened)


def find_server(server: str | None, store: Path, api_key: str | None) -> RemoteServer | None:
    """The server to talk to; None when this process may take the store's lock itself."""
    if server is not None:
        return RemoteServer(server, api_key=api_key)
    if not (store / LOCK_NAME).is_file():
        return None  # and nothing is made in a folder that only looks like a store
    try:
        StoreLock(store).release()
    except StoreLocked as locked:
        if locked.url is None:
            raise Unavailable(f"{locked.message}. It is still starting; try again in a moment.") from locked
        return RemoteServer(locked.url, api_key=api_key)
    return None
