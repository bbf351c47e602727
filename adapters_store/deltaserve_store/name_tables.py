"""The names of a store in memory: what snapshots are made of, and the rules of who may have which name."""

from __future__ import annotations

from collections.abc import Sequence

from deltaserve_store.catalog import Catalog
from deltaserve_store.errors import InvalidName, NameTaken, NotFound, VersionConflict
from deltaserve_store.manifest import AdapterRecord
from deltaserve_store.names import VERSION_PREFIX, AliasEntry, NameEntry, NameMap

MAX_PAGE = 10_000
NO_VERSION = "none"
"""What ``expected_version`` says of a name that must be new."""


class NameTables:
    """Follows the rows: after each transaction the store asks for ``refresh`` of what it changed. The caller
    serialises all calls.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._base_names: tuple[str, ...] = ()
        self.reload()

    def reload(self) -> None:
        self.adapters = self._catalog.entries()
        self.aliases = self._catalog.aliases()

    def refresh(self, tenant: str, name: str) -> None:
        """Reads one name back from the rows."""
        self.adapters.get(tenant, {}).pop(name, None)
        self.aliases.get(tenant, {}).pop(name, None)
        row = self._catalog.name(tenant, name)
        if row is not None and row.target is not None:
            self.aliases.setdefault(tenant, {})[name] = AliasEntry(row.target, row.version)
        entry = self._catalog.entry(tenant, name)
        if entry is not None:
            self.adapters.setdefault(tenant, {})[name] = entry

    def snapshot(self) -> NameMap:
        adapters = {tenant: dict(entries) for tenant, entries in self.adapters.items() if entries}
        aliases = {tenant: dict(entries) for tenant, entries in self.aliases.items() if entries}
        return NameMap(self._base_names, adapters, aliases)

    def page(self, tenant: str, limit: int, after: str | None) -> Sequence[AdapterRecord]:
        """Current records by name; raises ``InvalidName`` for a limit out of range."""
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidName(f"limit {limit} is out of range; use 1 to {MAX_PAGE}", param="limit")
        entries = self.adapters.get(tenant, {})
        names = sorted(name for name in entries if after is None or name > after)[:limit]
        return tuple(entries[name].records[entries[name].current] for name in names)

    def entry(self, tenant: str, name: str) -> tuple[str, NameEntry]:
        """The adapter that a name or alias means, with its own name; raises ``NotFound``."""
        alias = self.aliases.get(tenant, {}).get(name)
        name = alias.target if alias else name
        entry = self.adapters.get(tenant, {}).get(name)
        if entry is None:
            raise NotFound(f"there is no adapter named {name[:80]!a}", param="name")
        return name, entry

    def pinned_versions(self) -> frozenset[str]:
        """Versions that an alias holds on to."""
        return frozenset(
            alias.version for aliases in self.aliases.values() for alias in aliases.values() if alias.version
        )

    def outdated(self, keep: int) -> tuple[AdapterRecord, ...]:
        """Of each name the records beyond the newest ``keep``, without the current one."""
        return tuple(
            record
            for entries in self.adapters.values()
            for entry in entries.values()
            for record in list(entry.records.values())[keep:]
            if not record.is_current
        )

    def set_base_names(self, names: Sequence[str]) -> None:
        for table in (self.adapters, self.aliases):
            for tenant, entries in table.items():
                for name in names:
                    if name in entries:
                        raise NameTaken(
                            f"tenant {tenant} has an adapter or alias named {name!r}, which is a name of the base; "
                            "serve the base under another name",
                            param="name",
                        )
        self._base_names = tuple(names)

    def check_free(self, tenant: str, name: str, *, kind: str) -> None:
        """Raises ``NameTaken`` unless ``name`` is new or already of that kind ("adapter" or "alias")."""
        if name in self._base_names:
            raise NameTaken(f"{name!a} is a name of the base; choose another", param="name")
        other, table = ("alias", self.aliases) if kind == "adapter" else ("adapter", self.adapters)
        if name in table.get(tenant, {}):
            raise NameTaken(f"{name!a} is taken by an {other}; choose another name or delete that", param="name")

    def check_expected(self, tenant: str, name: str, expected: str | None) -> None:
        """Raises ``VersionConflict`` unless ``expected`` (None: anything) begins the current version."""
        if expected is None:
            return
        entry = self.adapters.get(tenant, {}).get(name)
        current = entry.current if entry is not None else NO_VERSION
        is_well_formed = expected == NO_VERSION or VERSION_PREFIX.fullmatch(expected) is not None
        if not is_well_formed or not current.startswith(expected):
            raise VersionConflict(
                f"expected_version is {expected[:80]!a}, the current version of {name!a} is {current}; "
                "look at it and try again",
                param="expected_version",
            )


def match_version(name: str, entry: NameEntry, prefix: str) -> str:
    """The one version of a name that begins with ``prefix``; raises ``NotFound``."""
    matches = [version for version in entry.records if version.startswith(prefix)]
    if VERSION_PREFIX.fullmatch(prefix) is None or len(matches) != 1:
        raise NotFound(
            f"{len(matches)} versions of {name!a} begin with {prefix[:64]!a}; give 8 to 64 hex digits that fit one",
            param="version",
        )
    return matches[0]


def version_before(name: str, entry: NameEntry) -> str:
    """The version stored before the current one; raises ``NotFound``."""
    versions = tuple(entry.records)
    position = versions.index(entry.current) + 1
    if position >= len(versions):
        raise NotFound(f"{name!a} has no version before the current one", param="version")
    return versions[position]
