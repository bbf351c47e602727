"""Zip archives: the whole central directory is checked before a byte is unpacked."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from io import FileIO

from deltaserve_store.archive_names import ArchiveNames
from deltaserve_store.file_names import FileRole, cap_of
from deltaserve_store.findings import Findings, refuse
from deltaserve_store.upload_limits import UploadLimits

CHUNK_BYTES = 1 << 20
MAX_DIRECTORY_BYTES = 1 << 20
_END_OF_DIRECTORY = b"PK\x05\x06"
_END_BYTES = 22
_MAX_COMMENT = 65535
_LOCAL_HEADER_BYTES = 30
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error, ValueError)
"""What the standard library raises over bytes that are no zip (ValueError: names that are not UTF-8, bad seeks)."""


class ZipArchive:
    """A checked zip: ``files`` are (flat name, role, entry) of what may be unpacked."""

    def __init__(self, file: FileIO, limits: UploadLimits) -> None:
        """Raises ``AdapterInvalid`` with every reason found in the directory."""
        self._limits = limits
        _check_directory_size(file, limits)
        try:
            self._zip = zipfile.ZipFile(file)
        except _DAMAGE as error:
            raise refuse("bad_archive", "archive", f"damaged ({error})", "an intact zip") from None
        findings = Findings()
        names = ArchiveNames(findings)
        self.files: list[tuple[str, FileRole, zipfile.ZipInfo]] = []
        for entry in self._zip.infolist():
            self._check_entry(entry, names, findings)
        _check_overlap(self._zip.infolist(), findings)
        total = sum(entry.file_size for _, _, entry in self.files)
        if total > limits.max_total_bytes:
            findings.add("archive_bomb", "archive", f"{total} bytes", f"at most {limits.max_total_bytes} unpacked")
        findings.raise_if_any()

    def read(self, entry: zipfile.ZipInfo) -> Iterator[bytes]:
        """The entry's bytes; more than its directory entry announces, or a wrong checksum, is an error."""
        left = entry.file_size
        try:
            with self._zip.open(entry) as source:
                while chunk := source.read(CHUNK_BYTES):
                    left -= len(chunk)
                    if left < 0:
                        raise refuse("archive_bomb", entry.filename, "more bytes than announced", "honest sizes")
                    yield chunk
        except _DAMAGE as error:
            raise refuse("bad_archive", entry.filename, f"damaged ({error})", "an intact zip") from None
        if left:
            raise refuse("bad_archive", entry.filename, f"{left} bytes missing", "an intact zip")

    def _check_entry(self, entry: zipfile.ZipInfo, names: ArchiveNames, findings: Findings) -> None:
        # ZipInfo cuts its name at a NUL; the original tells what the archive really says.
        path = entry.orig_filename if "\0" in entry.orig_filename else entry.filename
        mode = entry.external_attr >> 16
        if mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            findings.add("not_a_regular_file", path, "a link or device", "regular files and folders")
            return
        if entry.is_dir():
            names.accept_folder(path)
            return
        if entry.flag_bits & 0x1:
            findings.add("bad_archive", path, "an encrypted entry", "entries without a password")
            return
        if entry.compress_type not in _METHODS:
            findings.add("bad_archive", path, f"compression {entry.compress_type}", "stored or deflated entries")
            return
        accepted = names.accept_file(path)
        if accepted is None:
            return
        if entry.file_size > cap_of(accepted[0]):
            findings.add("file_too_large", path, f"{entry.file_size} bytes", f"at most {cap_of(accepted[0])} bytes")
            return
        ratio = entry.file_size / max(1, entry.compress_size)
        if entry.file_size > self._limits.ratio_floor_bytes and ratio > self._limits.max_ratio:
            found = f"{entry.file_size} bytes from {entry.compress_size}"
            findings.add("archive_bomb", path, found, f"a ratio of at most {self._limits.max_ratio}")
            return
        self.files.append((*accepted, entry))


def _check_directory_size(file: FileIO, limits: UploadLimits) -> None:
    """Reads the end record by itself, so that a directory of a million entries is never turned into objects."""
    size = file.seek(0, os.SEEK_END)
    start = max(0, size - _END_BYTES - _MAX_COMMENT)
    file.seek(start)
    tail = file.read()
    file.seek(0)
    position = tail.rfind(_END_OF_DIRECTORY)
    if position < 0 or len(tail) - position < _END_BYTES:
        raise refuse("bad_archive", "archive", "no end record", "an intact zip")
    num_entries, directory_bytes, directory_start = struct.unpack_from("<HII", tail, position + 10)
    if num_entries == 0xFFFF or 0xFFFFFFFF in (directory_bytes, directory_start):
        raise refuse("bad_archive", "archive", "zip64 sizes", "an archive below 4 GB and 65535 entries")
    if tail[max(0, position - 20) : position].startswith(b"PK\x06\x07"):
        raise refuse("bad_archive", "archive", "zip64 sizes", "an archive below 4 GB and 65535 entries")
    if num_entries > limits.max_entries or directory_bytes > MAX_DIRECTORY_BYTES:
        raise refuse("archive_bomb", "archive", f"{num_entries} entries", f"at most {limits.max_entries} files")
    if directory_start + directory_bytes != start + position:
        raise refuse("bad_archive", "archive", "bytes around the archive", "nothing before, between or after entries")


def _check_overlap(entries: list[zipfile.ZipInfo], findings: Findings) -> None:
    """Entries that share bytes are how a small file unpacks to a huge one."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            findings.add("archive_bomb", entry.filename, "overlaps another entry", "entries with bytes of their own")
        end = entry.header_offset + _LOCAL_HEADER_BYTES + entry.compress_size
