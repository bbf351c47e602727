"""Where uploads land before they are an adapter: bounded, flat, named only by the allow-list, swept at start."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from deltaserve_store.archive_names import ArchiveNames
from deltaserve_store.durable import full_disk_as_error, remove_tree
from deltaserve_store.errors import StoreFull, UploadTooLarge
from deltaserve_store.file_names import REFUSALS, FileRole, cap_of, role_of
from deltaserve_store.findings import Findings, refuse
from deltaserve_store.tar_archive import TarArchive
from deltaserve_store.upload_limits import UploadLimits
from deltaserve_store.zip_archive import ZipArchive

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class StagingArea(Protocol):
    """The part of ``AdapterStore`` that staging needs."""

    @property
    def scratch_dir(self) -> Path: ...

    def room_bytes(self) -> int | None: ...


class Staging:
    """Makes staged uploads inside a store."""

    def __init__(self, store: StagingArea, *, limits: UploadLimits | None = None) -> None:
        self._store = store
        self._limits = limits or UploadLimits()

    def open(self) -> StagedUpload:
        with full_disk_as_error():
            return StagedUpload(self._store.scratch_dir, self._limits, self._store.room_bytes())


class StagedUpload:
    """One upload under way. As a context manager it discards itself at the end, whatever happened.

    ``folder`` holds the files that count; ``skipped`` names those that came along and were dropped unread.
    """

    def __init__(self, scratch: Path, limits: UploadLimits, room_bytes: int | None) -> None:
        self._root = scratch / f"upload-{secrets.token_hex(16)}"
        self.folder = self._root / "files"
        self._root.mkdir(mode=0o700)
        self.folder.mkdir(mode=0o700)
        self._descriptor = os.open(self.folder, _FOLDER)
        self._limits = limits
        self._room_bytes = room_bytes
        self._num_bytes = 0
        self._num_files = 0
        self._names: set[str] = set()
        self.skipped: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def discard(self) -> None:
        """Removes everything; harmless when done before."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        remove_tree(self._root)

    @contextmanager
    def writer(self, name: str) -> Iterator[StagedWriter]:
        """Receives one file piece by piece. Raises ``AdapterInvalid`` when the name may not be uploaded."""
        role = role_of(name)
        if role in REFUSALS:
            code, allowed = REFUSALS[role]
            raise refuse(code, name, name, allowed)
        if name in self._names:
            raise refuse("duplicate_file", name, name, "each name once")
        self._count_file()
        self._names.add(name)
        if role is FileRole.SKIPPED:
            self.skipped.append(name)
            yield StagedWriter(name, None, cap_of(name), self._book)
            return
        with self._new_file(name) as writer:
            yield writer

    def write(self, name: str, chunks: Iterable[bytes]) -> int:
        """One file from its chunks; returns its size. Raises ``UploadTooLarge`` beyond the caps, ``StoreFull``."""
        with self.writer(name) as writer:
            for chunk in chunks:
                writer.write(chunk)
        return writer.num_bytes

    @contextmanager
    def archive_writer(self) -> Iterator[StagedWriter]:
        """Receives an archive piece by piece; afterwards ``unpack()`` takes it."""
        with full_disk_as_error():
            file = os.fdopen(os.open(self.archive_path, _NEW_FILE, 0o600), "wb", buffering=0)
            with file:
                yield StagedWriter("archive", file, self._limits.max_total_bytes, self._check_room)

    @property
    def archive_path(self) -> Path:
        """Where ``archive_writer`` puts what it receives; outside ``folder``."""
        return self._root / "archive"

    def unpack(self, archive: Path | None = None) -> None:
        """Unpacks a .zip, .tar or .tar.gz (told by its first bytes) into ``folder``; an archive received by
        ``archive_writer`` is removed afterwards. Raises ``AdapterInvalid`` with all reasons; then nothing counts.
        """
        path = archive or self.archive_path
        with open(path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size > self._limits.max_total_bytes:
                raise UploadTooLarge(f"the archive exceeds {self._limits.max_total_bytes} bytes")
            magic = file.read(262)
            file.seek(0)
            if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                self._unpack_zip(file)
            elif magic.startswith(b"\x1f\x8b") or magic[257:262] == b"ustar":
                self._unpack_tar(file)
            else:
                raise refuse("bad_archive", "archive", magic[:8], "a .zip, .tar or .tar.gz archive")
        if archive is None:
            path.unlink()

    def _unpack_zip(self, file: FileIO) -> None:
        source = ZipArchive(file, self._limits)
        for name, role, entry in source.files:
            self._take(name, role, source.read(entry))

    def _unpack_tar(self, file: FileIO) -> None:
        findings = Findings()
        names = ArchiveNames(findings)
        source = TarArchive(file, self._limits)
        for entry in source.entries():
            if entry.is_folder:
                names.accept_folder(entry.path)
                continue
            accepted = names.accept_file(entry.path)
            if accepted is None:
                continue
            self._take(*accepted, source.read_entry())
        findings.raise_if_any()

    def _take(self, name: str, role: FileRole, chunks: Iterable[bytes]) -> None:
        if role is FileRole.SKIPPED:
            self._count_file()
            self.skipped.append(name)
            return
        self.write(name, chunks)

    def _count_file(self) -> None:
        self._num_files += 1
        if self._num_files > self._limits.max_entries:
            raise refuse("unexpected_file", "files", "too many files", f"at most {self._limits.max_entries} files")

    @contextmanager
    def _new_file(self, name: str) -> Iterator[StagedWriter]:
        """A new file by its flat name relative to the open folder: no path is walked, no link followed."""
        with full_disk_as_error():
            descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=self._descriptor)
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                yield StagedWriter(name, file, cap_of(name), self._book)

    def _book(self, num_bytes: int) -> None:
        """Bytes that are about to be added to the files."""
        self._num_bytes += num_bytes
        if self._num_bytes > self._limits.max_total_bytes:
            raise UploadTooLarge(f"the upload exceeds {self._limits.max_total_bytes} bytes")
        self._check_room(0)

    def _check_room(self, num_bytes: int) -> None:
        if self._room_bytes is not None and self._num_bytes + num_bytes > self._room_bytes:
            raise StoreFull("the store's quota is used up; delete adapters or run gc, or raise --store-quota")


class StagedWriter:
    """Appends to one staged file (or counts and drops, for skipped ones) within its cap."""

    def __init__(self, name: str, file: FileIO | None, max_bytes: int, book: Callable[[int], None]) -> None:
        self._name = name
        self._file = file
        self._max_bytes = max_bytes
        self._book = book
        self.num_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Raises ``UploadTooLarge`` beyond the cap of the file or the upload, ``StoreFull`` without room."""
        self.num_bytes += len(chunk)
        if self.num_bytes > self._max_bytes:
            raise UploadTooLarge(f"{self._name} exceeds {self._max_bytes} bytes", param=self._name)
        self._book(len(chunk))
        if self._file is None:
            return
        view = memoryview(chunk)
        while view:
            view = view[self._file.write(view) or 0 :]
