"""The store's SQLite file: numbered migrations, WAL, ``synchronous=FULL``, one writer.

Bytes live in folders, names live here. A row is written only after the folder it speaks of is on stable storage, so a
crash leaves at worst a folder that no row knows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaserve_store.durable import full_disk_as_error
from deltaserve_store.errors import StoreCorrupt

DATABASE_NAME = "store.db"

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE versions (
        version TEXT PRIMARY KEY,
        manifest TEXT NOT NULL,
        state TEXT NOT NULL,
        state_reason TEXT
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE names (
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN ('adapter', 'alias')),
        target TEXT,
        version TEXT REFERENCES versions (version),
        CHECK ((kind = 'adapter') = (target IS NULL)),
        PRIMARY KEY (tenant, name)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE entries (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        version TEXT NOT NULL REFERENCES versions (version),
        created_at REAL NOT NULL,
        base_fingerprint TEXT NOT NULL,
        effect REAL,
        waivers TEXT NOT NULL,
        source TEXT NOT NULL,
        state TEXT NOT NULL,
        UNIQUE (tenant, name, version)
    ) STRICT;
    CREATE INDEX entries_version ON entries (version);
    CREATE TABLE evidence (
        version TEXT NOT NULL REFERENCES versions (version) ON DELETE CASCADE,
        key TEXT NOT NULL,
        payload TEXT NOT NULL,
        created_at REAL NOT NULL,
        PRIMARY KEY (version, key)
    ) STRICT, WITHOUT ROWID;
    """,
)
"""Migration i brings a database from user_version i to i + 1. Never changed once released; new ones are appended."""


class Database:
    """One connection; the caller serialises its use. Raises ``StoreCorrupt`` for a file that is no such database."""

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        path = folder / DATABASE_NAME
        mode = "ro" if read_only else "rwc"
        try:
            self._connection = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=10.0,
            )
        except sqlite3.OperationalError as error:
            raise StoreCorrupt("the store's database cannot be opened; check the --store folder") from error
        try:
            self._connection.row_factory = sqlite3.Row
            self._prepare(read_only)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise StoreCorrupt(f"the store's database is damaged ({error}); restore it from a backup") from error
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self, read_only: bool) -> None:
        if not read_only:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")
        if self._connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise StoreCorrupt("the store's database is damaged; restore it from a backup")
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise StoreCorrupt(
                f"the store has format {version}, this program knows up to {len(MIGRATIONS)}; use a newer program"
            )
        if read_only:
            return
        for number in range(version, len(MIGRATIONS)):
            script = MIGRATIONS[number]
            with full_disk_as_error():
                self._connection.executescript(f"BEGIN IMMEDIATE;{script};PRAGMA user_version = {number + 1};COMMIT;")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; durable when the block has been left without an error."""
        with full_disk_as_error():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def read(self, query: str, parameters: tuple[object, ...] = ()) -> list[sqlite3.Row]:
        return self._connection.execute(query, parameters).fetchall()

    def close(self) -> None:
        self._connection.close()
