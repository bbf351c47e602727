"""From the ``model`` field of a request to a version, in memory and without locks.

A ``NameMap`` is an immutable snapshot: the store makes a new one after each change and whoever serves requests swaps
it in one assignment. Names and aliases of a tenant share one space; only base names may hold other characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from deltaserve_store.errors import InvalidName, NotFound
from deltaserve_store.manifest import AdapterRecord

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION_PREFIX = re.compile(r"[0-9a-f]{8,64}")
DEFAULT_TENANT = "default"


def validate_name(name: str, *, param: str = "name") -> str:
    """Returns ``name``; raises ``InvalidName`` unless it is 1 to 64 characters of letters, digits and ``._-``."""
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        shown = ascii(name[:80]) if isinstance(name, str) else type(name).__name__
        raise InvalidName(
            f"{param} {shown} is not a valid name; use 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit",
            param=param,
        )
    return name


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a ``model`` field means: ``version`` None is the base alone. ``name`` is the adapter's (or base's) own name,
    also when an alias was asked for.
    """

    name: str
    version: str | None
    record: AdapterRecord | None = None

    @property
    def is_base(self) -> bool:
        return self.version is None


@dataclass(frozen=True, slots=True)
class NameEntry:
    """One adapter name: its records by version, and the version it points to."""

    current: str
    records: Mapping[str, AdapterRecord]


@dataclass(frozen=True, slots=True)
class AliasEntry:
    """An alias points to an adapter name and follows it, or to one version of it when ``version`` is set."""

    target: str
    version: str | None = None


@dataclass(frozen=True, slots=True)
class NameMap:
    """Base names, and per tenant the adapters and aliases."""

    base_names: tuple[str, ...] = ()
    adapters: Mapping[str, Mapping[str, NameEntry]] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, AliasEntry]] = field(default_factory=dict)

    def resolve(self, tenant: str, model: str) -> Resolved:
        """Accepts a base name, an adapter name, ``name@version`` (a digest prefix of 8 to 64 hex digits that fits one
        version), an alias, and ``base:adapter``. Raises ``NotFound``.
        """
        if model in self.base_names:
            return Resolved(model, None)
        base, separator, rest = model.rpartition(":")
        if separator:
            if base not in self.base_names:
                raise _not_found(model, f"no base named {base[:80]!a} is served here")
            if rest in self.base_names:
                raise _not_found(model, "a base name cannot follow ':'")
        name, separator, prefix = rest.partition("@")
        own_aliases = self.aliases.get(tenant, {})
        alias = own_aliases.get(name)
        pinned: str | None = None
        if alias is not None:
            name, pinned = alias.target, alias.version
        entry = self.adapters.get(tenant, {}).get(name)
        if entry is None:
            raise _not_found(model, "see GET /v1/models for what is served")
        version = pinned or entry.current
        if separator:
            version = _match_prefix(model, prefix, entry, pinned)
        record = entry.records.get(version)
        if record is None:
            raise _not_found(model, "that version is no longer stored")
        return Resolved(name, version, record)

    def names(self, tenant: str) -> tuple[str, ...]:
        """Adapter names of a tenant, sorted."""
        return tuple(sorted(self.adapters.get(tenant, {})))

    def current(self, tenant: str) -> tuple[AdapterRecord, ...]:
        """The current record of each name of a tenant, by name."""
        entries = self.adapters.get(tenant, {})
        return tuple(entries[name].records[entries[name].current] for name in sorted(entries))

    def versions(self) -> frozenset[str]:
        """Every version that some name of some tenant may still ask for."""
        return frozenset(
            version for entries in self.adapters.values() for entry in entries.values() for version in entry.records
        )


def _match_prefix(model: str, prefix: str, entry: NameEntry, pinned: str | None) -> str:
    if VERSION_PREFIX.fullmatch(prefix) is None:
        raise _not_found(model, "after '@' come 8 to 64 lowercase hex digits of a version")
    pool = (pinned,) if pinned else tuple(entry.records)
    matches = [version for version in pool if version.startswith(prefix)]
    if not matches:
        raise _not_found(model, "no version of that name begins so")
    if len(matches) > 1:
        raise _not_found(model, f"{len(matches)} versions begin so; give more digits")
    return matches[0]


def _not_found(model: str, advice: str) -> NotFound:
    return NotFound(f"the model {model[:160]!a} does not exist; {advice}", param="model")
