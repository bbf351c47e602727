"""Version folders on disk: ``versions/<digest>/`` with the adapter's files and, written last, its manifest.

A folder is built in the scratch area, made durable, and moved into place by one rename, so under ``versions/`` there
is only what is complete. Folders are never changed afterwards; derived files live in a tree of their own.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from deltaserve_store.digest import content_digest, stored_file_names
from deltaserve_store.durable import CHUNK_BYTES, file_sha256, remove_tree, sync_file, sync_folder, write_durably
from deltaserve_store.errors import InvalidName, Reason, StoreCorrupt
from deltaserve_store.manifest import MANIFEST_NAME, AdapterManifest, StoredFile
from deltaserve_store.parsed import ParsedAdapter

VERSION = re.compile(r"[0-9a-f]{64}")
_DERIVED_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
SUBFOLDERS = ("versions", "derived", "staging", "quarantine")


def check_version(version: str) -> str:
    """Returns ``version``; raises ``InvalidName`` unless it is a whole digest. Paths are made of nothing else."""
    if not isinstance(version, str) or VERSION.fullmatch(version) is None:
        raise InvalidName("a version is 64 lowercase hex digits", param="version")
    return version


class VersionFolders:
    """``on_step`` is called with a name after every step a crash could follow; tests stop there."""

    def __init__(self, root: Path, on_step: Callable[[str], None]) -> None:
        self.root = root
        self.scratch = root / "staging"
        self._on_step = on_step

    def make(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in SUBFOLDERS:
            (self.root / name).mkdir(mode=0o700, exist_ok=True)

    def path(self, version: str) -> Path:
        return self.root / "versions" / check_version(version)

    def derived(self, version: str, key: str) -> Path:
        if _DERIVED_KEY.fullmatch(key) is None:
            raise InvalidName("a derived key is made of letters, digits, '.', '_' and '-'", param="key")
        return self.root / "derived" / check_version(version) / key

    def install(self, source: Path, parsed: ParsedAdapter, check_room: Callable[[int], None]) -> AdapterManifest:
        """Puts the adapter's files of ``source`` in place and returns their manifest. Files that are there already stay
        when their bytes are what was admitted; damaged ones are replaced.

        Files in our own scratch area are linked, others copied (nobody outside may keep a name for our bytes).
        ``check_room`` is asked with the size of a version that is new. A failure leaves nothing behind.
        """
        names = stored_file_names(source)
        build = self.scratch / f"version-{secrets.token_hex(16)}"
        try:
            build.mkdir(mode=0o700)
            self._on_step("build-made")
            for name in names:
                self._place(source / name, build / name)
                self._on_step(f"placed:{name}")
                sync_file(build / name)
                self._on_step(f"synced:{name}")
            manifest = _describe(build, names, parsed)
            target = self.path(manifest.version)
            if target.exists() and not self.verify(manifest.version):
                return self.manifest(manifest.version)
            check_room(manifest.bytes)
            write_durably(build / MANIFEST_NAME, manifest.to_json().encode())
            self._on_step("manifest-written")
            sync_folder(build)
            self._on_step("build-synced")
            if target.exists():
                self.quarantine(target)
                self._on_step("damaged-moved-away")
            os.rename(build, target)
            try:
                self._on_step("renamed")
                sync_folder(target.parent)
                self._on_step("rename-synced")
            except BaseException:
                os.rename(target, build)
                raise
            return manifest
        finally:
            remove_tree(build)

    def _place(self, source: Path, target: Path) -> None:
        if self.scratch in source.parents:
            os.link(source, target, follow_symlinks=False)
            return
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as reader, open(target, "xb") as writer:
            while chunk := reader.read(CHUNK_BYTES):
                writer.write(chunk)

    def manifest(self, version: str) -> AdapterManifest:
        """Raises ``StoreCorrupt`` when it is missing or not one of ours."""
        try:
            text = (self.path(version) / MANIFEST_NAME).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StoreCorrupt(f"version {version[:12]} has no readable manifest") from error
        return AdapterManifest.from_json(text)

    def faults(self, version: str) -> tuple[Reason, ...]:
        """What a quick look (names and sizes) finds wrong with a version folder; empty when nothing."""
        try:
            manifest = self.manifest(version)
        except StoreCorrupt as error:
            return (Reason("missing_file", MANIFEST_NAME, error.message, "the manifest as written"),)
        found = []
        for file in manifest.files:
            try:
                size = (self.path(version) / file.name).lstat().st_size
            except OSError:
                found.append(Reason("missing_file", file.name, "nothing", f"{file.bytes} bytes"))
                continue
            if size != file.bytes:
                found.append(Reason("bit_rot", file.name, f"{size} bytes", f"{file.bytes} bytes"))
        return tuple(found)

    def verify(self, version: str) -> tuple[Reason, ...]:
        """Reads every byte and compares digests; empty when the version is what was admitted."""
        found = list(self.faults(version))
        if found:
            return tuple(found)
        manifest = self.manifest(version)
        if manifest.version != version:
            found.append(Reason("bit_rot", MANIFEST_NAME, manifest.version, version))
        for file in manifest.files:
            sha256 = file_sha256(self.path(version) / file.name)
            if sha256 != file.sha256:
                found.append(Reason("bit_rot", file.name, sha256, file.sha256))
        if not found and content_digest(self.path(version)) != version:
            found.append(Reason("bit_rot", "adapter", "another content digest", version))
        return tuple(found)

    def names_on_disk(self) -> Iterator[str]:
        with os.scandir(self.root / "versions") as entries:
            yield from (entry.name for entry in entries)

    def remove(self, version: str) -> None:
        """First out of the way in one rename, then removed: no half-removed folder is ever under ``versions/``."""
        away = self.scratch / f"removed-{secrets.token_hex(16)}"
        if self.path(version).exists():
            os.rename(self.path(version), away)
            self._on_step("moved-away")
            remove_tree(away)
        remove_tree(self.root / "derived" / version)

    def quarantine(self, folder: Path) -> Path:
        """Moves a folder that nothing accounts for out of the way, for a person to look at; gc empties the place."""
        target = self.root / "quarantine" / f"{folder.name[:64]}-{secrets.token_hex(4)}"
        os.rename(folder, target)
        return target

    def empty_quarantine(self) -> None:
        for entry in (self.root / "quarantine").iterdir():
            remove_tree(entry)

    def sweep_scratch(self) -> int:
        """Removes what interrupted uploads left; returns how many there were."""
        left = list(self.scratch.iterdir())
        for entry in left:
            remove_tree(entry)
        return len(left)

    def sweep_derived(self, known: Iterable[str]) -> None:
        known = frozenset(known)
        for entry in (self.root / "derived").iterdir():
            if entry.name not in known:
                remove_tree(entry)


def _describe(folder: Path, names: tuple[str, ...], parsed: ParsedAdapter) -> AdapterManifest:
    files = tuple(StoredFile(name, (folder / name).stat().st_size, file_sha256(folder / name)) for name in names)
    return AdapterManifest(
        version=content_digest(folder),
        kinds=parsed.kinds,
        file_format=parsed.file_format,
        rank=parsed.rank,
        bytes=sum(file.bytes for file in files),
        num_parameters=parsed.num_parameters,
        num_modules=len(parsed.deltas),
        base_name=parsed.base_name,
        base_fingerprint=parsed.base_fingerprint,
        chat_template=parsed.chat_template,
        stop_token_ids=parsed.stop_token_ids,
        invocation_token_ids=parsed.invocation_token_ids,
        files=files,
        num_prefix_tokens=parsed.num_prefix_tokens,
        added_tokens=parsed.added_tokens,
    )
