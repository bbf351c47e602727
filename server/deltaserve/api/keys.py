"""API keys at rest: a JSON file of SHA-256 digests. The key itself is shown once, when it is made, and never kept.

File format: ``{"version": 1, "keys": [{"id", "sha256", "label", "tenant", "scopes", "created_at"}]}``. A key is
``ds-`` and 43 characters carrying 256 random bits, so a plain digest is as good as a slow one. No web framework here:
the command line uses this module too.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from deltaserve.errors import ConfigError, InvalidRequest, NotFound

KEY_PREFIX = "ds-"
MAX_KEY_CHARS = 256
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Scope(StrEnum):
    """What a key may do. ``USE``: generate and list. ``UPLOAD``: add versions, move names. ``ADMIN``: everything."""

    USE = "use"
    UPLOAD = "upload"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the key's id, or ``anonymous`` where the server runs without keys."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


ANONYMOUS = Caller("anonymous", "default", frozenset(Scope))


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One key as the file knows it. ``created_at`` is Unix time in seconds."""

    id: str
    sha256: str
    label: str
    tenant: str
    scopes: tuple[Scope, ...]
    created_at: float


class KeyRing:
    """The keys of one file. A running server sees changes of the file at the next request."""

    def __init__(self, path: Path, records: Iterable[KeyRecord] = ()) -> None:
        self.path = path
        self._records = {record.id: record for record in records}
        self._stamp = _stamp(path)

    @classmethod
    def load(cls, path: Path, *, must_exist: bool = True) -> KeyRing:
        """Reads a key file. Raises ConfigError when it is missing (unless allowed) or cannot be understood."""
        if not path.exists():
            if must_exist:
                raise ConfigError(f"the key file {path.name!r} does not exist; make one with `deltaserve keys add`")
            return cls(path)
        return cls(path, _read(path))

    @property
    def records(self) -> tuple[KeyRecord, ...]:
        return tuple(self._records.values())

    def add(self, *, label: str = "", tenant: str = "default", scopes: Iterable[Scope | str] = (Scope.USE,)) -> str:
        """Makes a key, writes the file (mode 0600, replaced as a whole) and returns the key: the only copy there is."""
        if not _NAME.fullmatch(tenant):
            raise InvalidRequest("tenant must be 1 to 64 letters, digits, '.', '_' or '-'", param="tenant")
        if len(label) > 200 or not label.isprintable():
            raise InvalidRequest("label must be at most 200 printable characters", param="label")
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        record = KeyRecord(secrets.token_hex(4), _digest(key), label, tenant, parse_scopes(scopes), time.time())
        with self._changing():
            self._records[record.id] = record
        return key

    def revoke(self, key_id: str) -> KeyRecord:
        """Removes a key by its id. Raises NotFound."""
        with self._changing():
            if key_id not in self._records:
                raise NotFound(f"no key has the id {key_id[:64]!a}; `deltaserve keys list` shows them", param="id")
            return self._records.pop(key_id)

    def authenticate(self, presented: str) -> Caller | None:
        """The key's owner, or None. Compares digests in constant time and looks at every record."""
        self._reload_if_changed()
        if len(presented) > MAX_KEY_CHARS:
            return None
        digest = _digest(presented)
        found: Caller | None = None
        for record in self._records.values():
            if hmac.compare_digest(record.sha256, digest):
                found = Caller(record.id, record.tenant, frozenset(record.scopes))
        return found

    def _reload_if_changed(self) -> None:
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._records = {record.id: record for record in _read(self.path)} if stamp else {}
        except ConfigError:
            self._records = {}  # a broken key file lets nobody in

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Changes the file as it is now, one command at a time: two at once must not bring back a revoked key."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            if self.path.exists():
                self._records = {record.id: record for record in _read(self.path)}
            yield
            self._write()
            os.fsync(folder)
        finally:
            os.close(folder)

    def _write(self) -> None:
        body = json.dumps({"version": 1, "keys": [asdict(record) for record in self._records.values()]}, indent=1)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".keys-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(body + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        self._stamp = _stamp(self.path)


def parse_scopes(scopes: Iterable[Scope | str]) -> tuple[Scope, ...]:
    """Raises InvalidRequest naming a scope that does not exist."""
    known = {scope.value for scope in Scope}
    wanted = tuple(dict.fromkeys(str(scope) for scope in scopes))
    unknown = [scope for scope in wanted if scope not in known]
    if unknown or not wanted:
        raise InvalidRequest(
            f"scopes {', '.join(unknown)[:80] or '(none)'} found; choose from {', '.join(sorted(known))}",
            param="scopes",
        )
    return tuple(Scope(scope) for scope in wanted)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> list[KeyRecord]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != 1:
            raise ValueError("unknown version")
        return [_record(entry) for entry in data["keys"]]
    except OSError as error:
        raise ConfigError(
            f"the key file {path.name!r} cannot be read ({error.strerror}); see who may read it"
        ) from error
    except (ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise ConfigError(
            f"the key file {path.name!r} cannot be understood ({type(error).__name__}); "
            "make a new one with `deltaserve keys add`"
        ) from error


def _record(entry: dict[str, object]) -> KeyRecord:
    digest, tenant, scopes = str(entry["sha256"]), str(entry["tenant"]), entry["scopes"]
    if not _DIGEST.fullmatch(digest) or not _NAME.fullmatch(tenant) or not isinstance(scopes, list):
        raise ValueError("malformed key record")
    created = entry["created_at"]
    if not isinstance(created, int | float):
        raise ValueError("malformed key record")
    return KeyRecord(str(entry["id"]), digest, str(entry["label"]), tenant, parse_scopes(scopes), float(created))
