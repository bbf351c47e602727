"""The adapter store: immutable versions named by content, and the names that point to them.

One process at a time writes (``lock.py``). A commit is durable when it returns: files, manifest, rename, then rows, in
that order, so that a crash at any point leaves the old state or the new one. Calls touch the disk and may be made from
any thread; ``snapshot`` is what request paths use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deltaserve_store.catalog import Admitted, Catalog
from deltaserve_store.database import DATABASE_NAME, Database
from deltaserve_store.durable import full_disk_as_error
from deltaserve_store.errors import InvalidName, NameTaken, NotFound, Reason, StoreReadOnly
from deltaserve_store.lock import StoreLock
from deltaserve_store.manifest import AdapterManifest, AdapterRecord
from deltaserve_store.name_tables import NameTables, match_version, version_before
from deltaserve_store.names import DEFAULT_TENANT, AliasEntry, NameMap, validate_name
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.quota import Quota
from deltaserve_store.reconcile import reconcile
from deltaserve_store.results import CommitResult, GcResult
from deltaserve_store.version_folders import VersionFolders


def _no_step(step: str) -> None:
    """Tests put a failure here."""


class AdapterStore:
    """Open with ``AdapterStore.open``; close it, or use it as a context manager, to give the lock back."""

    def __init__(
        self,
        folders: VersionFolders,
        database: Database,
        lock: StoreLock | None,
        *,
        quota_bytes: int | None,
        on_step: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._folders = folders
        self._database = database
        self._catalog = Catalog(database)
        self._lock = lock
        self._on_step = on_step
        self._clock = clock
        # Writers take turns for as long as files move; the mutex is held only while rows and tables change.
        self._writing = threading.RLock()
        self._mutex = threading.RLock()
        self.report: tuple[str, ...] = ()
        """What opening found and did: uploads swept, folders put into quarantine, versions that cannot be served."""
        if lock is not None:
            self.report = reconcile(folders, database, self._catalog)
        self._tables = NameTables(self._catalog)
        sizes = {version: manifest.bytes for version, (_, manifest) in self._catalog.versions().items()}
        self._quota = Quota(quota_bytes, sizes)

    @classmethod
    def open(
        cls,
        path: Path,
        lock: bool = True,
        url: str | None = None,
        quota_bytes: int | None = None,
        *,
        base_names: Sequence[str] = (),
        on_step: Callable[[str], None] = _no_step,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Opens the store at ``path``, making it where there is none.

        With ``lock`` False it is opened for reading only, beside a server or without one. ``quota_bytes`` bounds the
        adapters' files. Raises ``StoreLocked`` with the holder's URL, ``StoreCorrupt``, ``StoreFull``.
        """
        folders = VersionFolders(Path(path), on_step)
        if not lock and not (Path(path) / DATABASE_NAME).exists():
            raise NotFound("there is no store here yet; start a server on it, or add an adapter", param="store")
        with full_disk_as_error(), ExitStack() as undo:
            held: StoreLock | None = None
            if lock:
                folders.make()
                held = StoreLock(folders.root, url=url)
                undo.callback(held.release)
            database = Database(folders.root, read_only=not lock)
            undo.callback(database.close)
            store = cls(folders, database, held, quota_bytes=quota_bytes, on_step=on_step, clock=clock)
            store.set_base_names(base_names)
            undo.pop_all()
            return store

    def close(self) -> None:
        with self._writing, self._mutex:
            self._database.close()
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # places

    @property
    def scratch_dir(self) -> Path:
        """For work in progress on the store's file system; emptied when the store is opened."""
        self._check_writable()
        return self._folders.scratch

    def version_dir(self, version: str) -> Path:
        """The folder of a version's files: to be read, never changed."""
        return self._folders.path(version)

    def derived_dir(self, version: str, key: str) -> Path:
        """Where files computed from a version belong; made by who writes there, removed with the version."""
        return self._folders.derived(version, key)

    def set_url(self, url: str | None) -> None:
        """Tells, through the lock file, where this process listens."""
        self._check_writable()
        if self._lock is not None:
            self._lock.set_url(url)

    def set_base_names(self, names: Sequence[str]) -> None:
        """The names of the base, which no adapter may have. Raises ``NameTaken`` when one has it already."""
        with self._mutex:
            self._tables.set_base_names(names)

    # reading

    def snapshot(self) -> NameMap:
        """All names as they are now; immutable, so the holder never waits for the store."""
        with self._mutex:
            return self._tables.snapshot()

    def get(self, tenant: str, name: str) -> AdapterRecord:
        """The record that an adapter name, alias or ``name@version`` means; raises ``NotFound``."""
        resolved = self.snapshot().resolve(tenant, name)
        if resolved.record is None:
            raise NotFound(f"{name!a} is the base, not an adapter", param="name")
        return resolved.record

    def list(self, tenant: str, limit: int = 100, after: str | None = None) -> Sequence[AdapterRecord]:
        """Current records by name, those after ``after``; fewer than ``limit`` on the last page."""
        with self._mutex:
            return self._tables.page(tenant, limit, after)

    def versions(self, tenant: str, name: str) -> Sequence[AdapterRecord]:
        """All versions of a name (or of the adapter an alias follows), newest first; raises ``NotFound``."""
        with self._mutex:
            return tuple(self._tables.entry(tenant, name)[1].records.values())

    def aliases(self, tenant: str) -> Mapping[str, AliasEntry]:
        with self._mutex:
            return dict(self._tables.aliases.get(tenant, {}))

    def used_bytes(self) -> int:
        """Bytes of all stored adapter files; what ``quota_bytes`` is held against."""
        with self._mutex:
            return self._quota.used_bytes()

    def room_bytes(self) -> int | None:
        """How many bytes the quota leaves; None without a quota."""
        with self._mutex:
            return self._quota.room_bytes()

    def get_evidence(self, version: str, key: str) -> Mapping[str, Any] | None:
        """What ``put_evidence`` stored; None when there is nothing under that key."""
        with self._mutex:
            return self._catalog.evidence(version, key)

    def verify(self, version: str) -> tuple[Reason, ...]:
        """Reads a version back and compares digests: empty when it is whole. A damaged one is marked as failed, a
        mended one as stored. Raises ``NotFound``.
        """
        with self._mutex:
            if not self._catalog.has_version(version):
                raise NotFound(f"version {version[:12]!a} is not stored", param="version")
        found = self._folders.verify(version)
        if self._lock is not None:
            with self._writing, self._mutex:
                with self._database.transaction() as connection:
                    reason = f"{found[0].code}: {found[0].where}" if found else None
                    self._catalog.mark(connection, version, "failed" if found else "stored", reason)
                self._tables.reload()
        return found

    # writing

    def commit(
        self,
        staged_folder: Path,
        parsed: ParsedAdapter,
        *,
        name: str,
        tenant: str = DEFAULT_TENANT,
        base_fingerprint: str,
        evidence: Mapping[str, Any] | None = None,
        waivers: Sequence[str] = (),
        expected_version: str | None = None,
        state: str = "stored",
        source: str = "",
        evidence_key: str | None = None,
    ) -> CommitResult:
        """Stores the files of ``staged_folder`` as a version and moves ``name`` to it; durable when it returns.

        ``parsed`` is what ``read_adapter`` made of these files. ``expected_version`` (digest or prefix of 8 or more
        digits; "none" for a new name) must be current. ``evidence["effect"]`` goes into the record; with
        ``evidence_key`` the whole evidence is stored under that key. Raises ``NameTaken``, ``VersionConflict``,
        ``StoreFull``; then nothing has changed.
        """
        self._check_writable()
        validate_name(name)
        effect = (evidence or {}).get("effect")
        admitted = Admitted(
            tenant=tenant,
            name=name,
            created_at=self._clock(),
            base_fingerprint=base_fingerprint,
            effect=None if effect is None else float(effect),
            waivers=tuple(waivers),
            source=source,
            state=state,
        )
        with self._writing, full_disk_as_error():
            with self._mutex:
                self._tables.check_free(tenant, name, kind="adapter")
                self._tables.check_expected(tenant, name, expected_version)
            manifest = self._folders.install(staged_folder, parsed, self._quota.check)
            with self._mutex:
                try:
                    created = self._write_rows(manifest, admitted, evidence or {}, evidence_key)
                except BaseException:
                    if not self._catalog.has_version(manifest.version):
                        self._folders.remove(manifest.version)
                    raise
                self._quota.add(manifest.version, manifest.bytes)
                self._tables.refresh(tenant, name)
                self._on_step("committed")
                return CommitResult(self._tables.adapters[tenant][name].records[manifest.version], created)

    def _write_rows(
        self, manifest: AdapterManifest, admitted: Admitted, evidence: Mapping[str, Any], evidence_key: str | None
    ) -> bool:
        with self._database.transaction() as connection:
            self._catalog.put_version(connection, manifest)
            created = self._catalog.put_entry(connection, manifest.version, admitted)
            if evidence_key is not None:
                self._catalog.put_evidence(connection, manifest.version, evidence_key, evidence, admitted.created_at)
            self._on_step("rows-written")
        return created

    def rollback(self, tenant: str, name: str, version: str | None = None) -> AdapterRecord:
        """Moves a name to an earlier version of its own (digest or prefix); without one, to the version stored before
        the current one. Raises ``NotFound``.
        """
        self._check_writable()
        with self._writing, self._mutex:
            name, entry = self._tables.entry(tenant, name)
            target = version_before(name, entry) if version is None else match_version(name, entry, version)
            with self._database.transaction() as connection:
                self._catalog.point(connection, tenant, name, target)
            self._tables.refresh(tenant, name)
            return self._tables.adapters[tenant][name].records[target]

    def alias(self, tenant: str, alias: str, target: str) -> AliasEntry:
        """Points an alias (made if new) at an adapter name, which it then follows, or at ``name@version``."""
        self._check_writable()
        validate_name(alias, param="alias")
        with self._writing, self._mutex:
            self._tables.check_free(tenant, alias, kind="alias")
            name, separator, prefix = target.partition("@")
            entry = self._tables.adapters.get(tenant, {}).get(name)
            if entry is None:
                raise NotFound(f"an alias points to an adapter; there is none named {name[:80]!a}", param="target")
            version = match_version(name, entry, prefix) if separator else None
            with self._database.transaction() as connection:
                self._catalog.put_alias(connection, tenant, alias, name, version)
            self._tables.refresh(tenant, alias)
            return AliasEntry(name, version)

    def delete(self, tenant: str, name: str) -> None:
        """Forgets an adapter name with its history, or an alias. The bytes stay until ``gc``. Raises ``NotFound``, and
        ``NameTaken`` while aliases point to the name.
        """
        self._check_writable()
        with self._writing, self._mutex:
            if self._catalog.name(tenant, name) is None:
                raise NotFound(f"there is no adapter or alias named {name[:80]!a}", param="name")
            aliases = self._catalog.aliases_of(tenant, name)
            if aliases:
                raise NameTaken(
                    f"aliases point to {name!a}: {', '.join(aliases[:10])}; delete or move them first",
                    param="name",
                    code="name_in_use",
                )
            with self._database.transaction() as connection:
                self._catalog.delete_name(connection, tenant, name)
            self._tables.refresh(tenant, name)

    def put_evidence(self, version: str, key: str, payload: Mapping[str, Any]) -> None:
        """What was measured of a version under ``key``; replaces what was there. Raises ``NotFound``."""
        self._check_writable()
        with self._writing, self._mutex, self._database.transaction() as connection:
            self._catalog.put_evidence(connection, version, key, payload, self._clock())

    def gc(self, *, keep: int = 10, protect: Collection[str] = ()) -> GcResult:
        """Keeps of each name the newest ``keep`` versions, the current one and those aliases are pinned to; removes
        versions that no name has any more, except ``protect`` (in use by running requests), and empties quarantine.
        """
        self._check_writable()
        if keep < 1:
            raise InvalidName(f"keep {keep} is out of range; at least 1 version of a name is kept", param="keep")
        with self._writing:
            with self._mutex:
                kept = self._tables.pinned_versions() | frozenset(protect)
                with self._database.transaction() as connection:
                    for record in self._tables.outdated(keep):
                        if record.version not in kept:
                            self._catalog.delete_entry(connection, record)
                    unnamed = tuple(version for version in self._catalog.unnamed_versions() if version not in kept)
                    for version in unnamed:
                        self._catalog.delete_version(connection, version)
                self._tables.reload()
                num_bytes = sum(self._quota.remove(version) for version in unnamed)
            self._on_step("gc-rows-deleted")
            for version in unnamed:
                self._folders.remove(version)
            self._folders.empty_quarantine()
            return GcResult(unnamed, num_bytes)

    def _check_writable(self) -> None:
        if self._lock is None:
            raise StoreReadOnly("the store was opened for reading only; send the command to its server")
