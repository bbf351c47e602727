"""Tar archives (ustar, GNU and pax headers), read forward once with every size bounded.

The standard library reads extended headers of any announced size into memory and seeks back and forth; an upload gets
a reader that cannot. Format: POSIX.1-2017 ``pax``, "ustar Interchange Format".
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.findings import refuse
from deltaserve_store.upload_limits import UploadLimits

BLOCK = 512
MAX_EXTENDED_HEADER = 64 << 10
CHUNK_BYTES = 1 << 20
PACKED_BYTES = 64 << 10
_FILE_TYPES = (b"0", b"\0", b"7")
_DECIMAL = re.compile(r"[0-9]{1,20}")
_TYPE_NAMES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class TarEntry:
    path: str
    num_bytes: int
    is_folder: bool


class TarArchive:
    """Iterate ``entries()``; after each file entry, ``read_entry`` may be drained or left: the rest is passed over."""

    def __init__(self, file: FileIO, limits: UploadLimits) -> None:
        """``file`` is at its start, plain or gzip-compressed."""
        self._limits = limits
        self._raw = file
        self._gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._stream: FileIO | _Gunzip = _Gunzip(file) if self._gzip else file
        self._num_read = 0
        self._left = 0
        self._padding = 0

    def entries(self) -> Iterator[TarEntry]:
        """Raises ``AdapterInvalid`` for damage, links, devices, sparse files and sizes beyond the limits."""
        extended: dict[str, str] = {}
        num_entries = 0
        while (header := self._next_header()) is not None:
            num_entries += 1
            if num_entries > 4 * self._limits.max_entries:
                raise refuse("archive_bomb", "archive", "too many entries", f"at most {self._limits.max_entries} files")
            kind, size = header[156:157], _number(header[124:136])
            path = _path(header)
            if kind in (b"x", b"g", b"L"):
                data = self._read_small(size)
                if kind == b"x":
                    extended |= _pax_fields(data)
                elif kind == b"L":
                    extended["path"] = data.rstrip(b"\0").decode("utf-8", "replace")
                continue
            path = extended.get("path", path)
            if "size" in extended:
                size = int(extended["size"]) if _DECIMAL.fullmatch(extended["size"]) else -1
            if any(key.startswith("GNU.sparse") for key in extended):
                kind = b"S"
            extended = {}
            if kind == b"5":
                yield TarEntry(path, 0, is_folder=True)
                continue
            if kind not in _FILE_TYPES:
                found = _TYPE_NAMES.get(kind, f"an entry of type {kind!r}")
                raise refuse("not_a_regular_file", path, found, "regular files and folders")
            if not 0 <= size <= self._limits.max_total_bytes:
                raise refuse("file_too_large", path, f"{size} bytes", f"at most {self._limits.max_total_bytes} bytes")
            self._left, self._padding = size, -size % BLOCK
            yield TarEntry(path, size, is_folder=False)
            self._skip_rest()

    def read_entry(self) -> Iterator[bytes]:
        """The bytes of the entry last yielded."""
        while self._left:
            chunk = self._read_exactly(min(CHUNK_BYTES, self._left))
            self._left -= len(chunk)
            yield chunk

    def _skip_rest(self) -> None:
        for _ in self.read_entry():
            pass
        if self._padding:
            self._read_exactly(self._padding)
            self._padding = 0

    def _next_header(self) -> bytes | None:
        """None at the end mark (a block of zeros) or at the end of the file."""
        header = self._read(BLOCK)
        if not header or header == bytes(BLOCK):
            return None
        if len(header) < BLOCK:
            raise refuse("bad_archive", "archive", "cut short", "a complete archive")
        expected = _number(header[148:156])
        if sum(header) - sum(header[148:156]) + 8 * 32 != expected:
            raise refuse("bad_archive", "archive", "a header with a wrong checksum", "a tar archive")
        return header

    def _read_small(self, size: int) -> bytes:
        if not 0 <= size <= MAX_EXTENDED_HEADER:
            raise refuse("archive_bomb", "archive", f"an extended header of {size} bytes", f"{MAX_EXTENDED_HEADER}")
        data = self._read_exactly(size)
        self._read_exactly(-size % BLOCK)
        return data

    def _read_exactly(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size:
            raise refuse("bad_archive", "archive", "cut short", "a complete archive")
        return data

    def _read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except (OSError, EOFError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise _damaged(error) from None
        self._num_read += len(data)
        overhead = BLOCK * 8 * self._limits.max_entries
        if self._num_read > self._limits.max_total_bytes + overhead:
            allowed = f"at most {self._limits.max_total_bytes} bytes unpacked"
            raise refuse("archive_bomb", "archive", "more bytes than that", allowed)
        if self._gzip and self._num_read > self._limits.ratio_floor_bytes:
            compressed = max(1, os.lseek(self._raw.fileno(), 0, os.SEEK_CUR))
            if self._num_read > self._limits.max_ratio * compressed:
                found = f"{self._num_read} bytes from {compressed}"
                raise refuse("archive_bomb", "archive", found, f"a ratio of at most {self._limits.max_ratio}")
        return data


class _Gunzip:
    """What gzip members (RFC 1952) unpack to. The standard library reads a member's header byte by byte, so that a file
    name of a gigabyte costs minutes; zlib passes over it as fast as over anything.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._packed = b""

    def read(self, size: int) -> bytes:
        """``size`` bytes, fewer at the end of the last member. Raises ``zlib.error``, ``EOFError``."""
        parts: list[bytes] = []
        while size > 0:
            self._packed = self._packed or self._file.read(PACKED_BYTES)
            if self._member.eof:
                self._packed = self._packed.lstrip(b"\0")  # padding between and after members
                if self._packed:
                    self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
                elif not (more := self._file.read(PACKED_BYTES)):
                    break
                else:
                    self._packed = more
                continue
            if not self._packed:
                raise EOFError("cut short")
            part = self._member.decompress(self._packed, size)
            self._packed = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _damaged(error: Exception) -> AdapterInvalid:
    return refuse("bad_archive", "archive", f"damaged ({error})", "an intact archive")


def _number(field: bytes) -> int:
    """Octal text, or big-endian binary when the top bit is set (GNU); -1 when it is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if not text:
        return 0
    return int(text, 8) if all(byte in b"01234567" for byte in text) else -1


def _path(header: bytes) -> str:
    """The path of a plain header. Bytes that are no UTF-8 become replacement characters, which no rule accepts."""
    path = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU tar keeps times, not a prefix, in that place
        prefix = header[345:500].split(b"\0", 1)[0]
        path = prefix + b"/" + path if prefix else path
    return path.decode("utf-8", "replace")


def _pax_fields(data: bytes) -> dict[str, str]:
    """Records ``"LENGTH KEY=VALUE\\n"``; LENGTH counts the whole record."""
    fields: dict[str, str] = {}
    while data:
        length_text, separator, _ = data.partition(b" ")
        length = int(length_text) if separator and length_text.isdigit() and len(length_text) < 8 else 0
        record = data[len(length_text) + 1 : length]
        if not len(length_text) + 1 < length <= len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise refuse("bad_archive", "archive", "a malformed pax header", "a tar archive")
        key, _, value = record[:-1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[length:]
    return fields
