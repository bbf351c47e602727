"""Names, versions and evidence as rows. Every method that writes runs inside a transaction of the caller's."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaserve_store.database import Database
from deltaserve_store.errors import NotFound
from deltaserve_store.manifest import AdapterManifest, AdapterRecord, BaseRef
from deltaserve_store.names import AliasEntry, NameEntry

_ENTRY_QUERY = """
SELECT e.tenant, e.name, e.version, e.created_at, e.base_fingerprint, e.effect, e.waivers, e.source,
       e.state AS entry_state, v.manifest, v.state AS version_state, v.state_reason, n.version AS current
FROM entries e
JOIN versions v ON v.version = e.version
JOIN names n ON n.tenant = e.tenant AND n.name = e.name
"""


@dataclass(frozen=True, slots=True)
class Admitted:
    """What the door knows of a version under a name, beyond its bytes."""

    tenant: str
    name: str
    created_at: float
    base_fingerprint: str
    effect: float | None
    waivers: tuple[str, ...]
    source: str
    state: str


@dataclass(frozen=True, slots=True)
class NameRow:
    """A taken name: ``target`` is set for an alias, ``version`` for an adapter or a pinned alias."""

    kind: str
    target: str | None
    version: str | None


class Catalog:
    def __init__(self, database: Database) -> None:
        self._database = database

    # reading

    def name(self, tenant: str, name: str) -> NameRow | None:
        rows = self._database.read("SELECT * FROM names WHERE tenant = ? AND name = ?", (tenant, name))
        return NameRow(rows[0]["kind"], rows[0]["target"], rows[0]["version"]) if rows else None

    def entry(self, tenant: str, name: str) -> NameEntry | None:
        """An adapter with its records, newest first; None when there is no such adapter."""
        query = f"{_ENTRY_QUERY} WHERE e.tenant = ? AND e.name = ? ORDER BY e.sequence DESC"
        rows = self._database.read(query, (tenant, name))
        return _entry(rows) if rows else None

    def entries(self) -> dict[str, dict[str, NameEntry]]:
        """All adapters by tenant and name."""
        grouped: dict[tuple[str, str], list[sqlite3.Row]] = {}
        for row in self._database.read(f"{_ENTRY_QUERY} ORDER BY e.sequence DESC"):
            grouped.setdefault((row["tenant"], row["name"]), []).append(row)
        result: dict[str, dict[str, NameEntry]] = {}
        for (tenant, name), rows in grouped.items():
            result.setdefault(tenant, {})[name] = _entry(rows)
        return result

    def aliases(self) -> dict[str, dict[str, AliasEntry]]:
        """All aliases by tenant and alias."""
        result: dict[str, dict[str, AliasEntry]] = {}
        for row in self._database.read("SELECT * FROM names WHERE kind = 'alias'"):
            result.setdefault(row["tenant"], {})[row["name"]] = AliasEntry(row["target"], row["version"])
        return result

    def aliases_of(self, tenant: str, target: str) -> tuple[str, ...]:
        query = "SELECT name FROM names WHERE tenant = ? AND kind = 'alias' AND target = ? ORDER BY name"
        return tuple(row["name"] for row in self._database.read(query, (tenant, target)))

    def versions(self) -> dict[str, tuple[str, AdapterManifest]]:
        """Every version with its stored state and its manifest."""
        rows = self._database.read("SELECT version, state, manifest FROM versions")
        return {row["version"]: (row["state"], AdapterManifest.from_json(row["manifest"])) for row in rows}

    def has_version(self, version: str) -> bool:
        return bool(self._database.read("SELECT 1 FROM versions WHERE version = ?", (version,)))

    def unnamed_versions(self) -> tuple[str, ...]:
        query = "SELECT version FROM versions WHERE version NOT IN (SELECT version FROM entries)"
        return tuple(row["version"] for row in self._database.read(query))

    def evidence(self, version: str, key: str) -> dict[str, Any] | None:
        query = "SELECT payload FROM evidence WHERE version = ? AND key = ?"
        rows = self._database.read(query, (version, key))
        return json.loads(rows[0]["payload"]) if rows else None

    # writing

    def put_version(self, connection: sqlite3.Connection, manifest: AdapterManifest) -> None:
        """A version whose folder has just been found or made whole."""
        connection.execute(
            "INSERT INTO versions VALUES (?, ?, 'stored', NULL)"
            " ON CONFLICT (version) DO UPDATE SET state = 'stored', state_reason = NULL",
            (manifest.version, manifest.to_json()),
        )

    def put_entry(self, connection: sqlite3.Connection, version: str, admitted: Admitted) -> bool:
        """Records the version under the name and moves the name to it; False when the name had it already."""
        known = connection.execute(
            "SELECT 1 FROM entries WHERE tenant = ? AND name = ? AND version = ?",
            (admitted.tenant, admitted.name, version),
        ).fetchone()
        connection.execute(
            "INSERT INTO entries (tenant, name, version, created_at, base_fingerprint, effect, waivers, source, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (tenant, name, version) DO UPDATE SET"
            " base_fingerprint = excluded.base_fingerprint, effect = excluded.effect, waivers = excluded.waivers,"
            " state = excluded.state",
            (
                admitted.tenant,
                admitted.name,
                version,
                admitted.created_at,
                admitted.base_fingerprint,
                admitted.effect,
                json.dumps(admitted.waivers),
                admitted.source,
                admitted.state,
            ),
        )
        self.point(connection, admitted.tenant, admitted.name, version)
        return known is None

    def point(self, connection: sqlite3.Connection, tenant: str, name: str, version: str) -> None:
        connection.execute(
            "INSERT INTO names VALUES (?, ?, 'adapter', NULL, ?)"
            " ON CONFLICT (tenant, name) DO UPDATE SET version = excluded.version",
            (tenant, name, version),
        )

    def put_alias(
        self, connection: sqlite3.Connection, tenant: str, alias: str, target: str, version: str | None
    ) -> None:
        connection.execute(
            "INSERT INTO names VALUES (?, ?, 'alias', ?, ?)"
            " ON CONFLICT (tenant, name) DO UPDATE SET target = excluded.target, version = excluded.version",
            (tenant, alias, target, version),
        )

    def delete_name(self, connection: sqlite3.Connection, tenant: str, name: str) -> None:
        connection.execute("DELETE FROM names WHERE tenant = ? AND name = ?", (tenant, name))
        connection.execute("DELETE FROM entries WHERE tenant = ? AND name = ?", (tenant, name))

    def delete_entry(self, connection: sqlite3.Connection, record: AdapterRecord) -> None:
        connection.execute(
            "DELETE FROM entries WHERE tenant = ? AND name = ? AND version = ?",
            (record.tenant, record.name, record.version),
        )

    def delete_version(self, connection: sqlite3.Connection, version: str) -> None:
        connection.execute("DELETE FROM versions WHERE version = ?", (version,))

    def mark(self, connection: sqlite3.Connection, version: str, state: str, reason: str | None) -> None:
        connection.execute(
            "UPDATE versions SET state = ?, state_reason = ? WHERE version = ?", (state, reason, version)
        )

    def put_evidence(
        self, connection: sqlite3.Connection, version: str, key: str, payload: Mapping[str, Any], created_at: float
    ) -> None:
        """Raises ``NotFound`` when the version is not stored."""
        try:
            connection.execute(
                "INSERT INTO evidence VALUES (?, ?, ?, ?) ON CONFLICT (version, key) DO UPDATE SET"
                " payload = excluded.payload, created_at = excluded.created_at",
                (version, key, json.dumps(dict(payload), sort_keys=True, allow_nan=False), created_at),
            )
        except sqlite3.IntegrityError as error:
            raise NotFound(f"version {version[:12]} is not stored", param="version") from error


def _entry(rows: Sequence[sqlite3.Row]) -> NameEntry:
    return NameEntry(rows[0]["current"], {row["version"]: _record(row) for row in rows})


def _record(row: sqlite3.Row) -> AdapterRecord:
    manifest = AdapterManifest.from_json(row["manifest"])
    is_version_well = row["version_state"] == "stored"
    return AdapterRecord(
        name=row["name"],
        version=row["version"],
        tenant=row["tenant"],
        kinds=manifest.kinds,
        file_format=manifest.file_format,
        rank=manifest.rank,
        bytes=manifest.bytes,
        num_parameters=manifest.num_parameters,
        created_at=row["created_at"],
        base=BaseRef(row["base_fingerprint"], manifest.base_name),
        state=row["entry_state"] if is_version_well else row["version_state"],
        state_reason=row["state_reason"],
        effect=row["effect"],
        waivers=tuple(json.loads(row["waivers"])),
        source=row["source"],
        chat_template=manifest.chat_template,
        stop_token_ids=manifest.stop_token_ids,
        invocation_token_ids=manifest.invocation_token_ids,
        is_current=row["version"] == row["current"],
        num_prefix_tokens=manifest.num_prefix_tokens,
        added_tokens=manifest.added_tokens,
    )
