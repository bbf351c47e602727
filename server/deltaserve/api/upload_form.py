"""A multipart form taken apart while it arrives: files into staging, small fields into memory.

Nothing is kept in memory beyond one network chunk and the small fields, and no path comes from the client.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deltaserve.errors import InvalidRequest
from deltaserve_store.names import validate_name
from deltaserve_store.staging import StagedUpload

MAX_PARTS = 64
MAX_HEADER_BYTES = 4096
MAX_FIELD_BYTES = 1024
_FLAGS = ("accept_base", "accept_no_effect")
_FIELDS = ("name", "expected_version", *_FLAGS)
_VERSION = re.compile(r"[0-9a-f]{64}")


def boundary_of(content_type: str) -> bytes | None:
    """The boundary of a ``multipart/form-data`` body, None for any other."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    return boundary if kind == b"multipart/form-data" and 1 <= len(boundary) <= 70 else None


class _Sink(Protocol):
    def write(self, chunk: bytes) -> None: ...


@dataclass(slots=True)
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    header_name: bytes = b""
    header_value: bytes = b""
    num_header_bytes: int = 0


class _TextField:
    """A small field of the form, kept in memory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data = b""

    def write(self, chunk: bytes) -> None:
        self.data += chunk
        if len(self.data) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"{self.name} has more than {MAX_FIELD_BYTES} bytes", param=self.name)


class UploadForm:
    """Feeds a multipart body part by part to staging. Used by one worker thread at a time."""

    def __init__(self, staged: StagedUpload, boundary: bytes) -> None:
        self._staged = staged
        self._open = ExitStack()
        self._part = _Part()
        self._sink: _Sink | None = None
        self._fields: dict[str, _TextField] = {}
        self._num_parts = 0
        self._num_files = 0
        self._has_archive = False
        self._is_complete = False
        callbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._all_read,
        }
        self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]

    def __enter__(self) -> UploadForm:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest("the multipart form is malformed", code="invalid_multipart") from error

    def finish(self) -> None:
        """Checks that the form ended and unpacks an archive."""
        if not self._is_complete:
            raise InvalidRequest("the multipart form ends before its last boundary", code="invalid_multipart")
        if not self._has_archive and not self._num_files:
            raise InvalidRequest("send the adapter's files as 'files', or one 'archive'", param="files")
        if self._has_archive:
            self._staged.unpack()

    def arguments(self) -> dict[str, Any]:
        """``name``, ``expected_version``, ``accept_base``, ``accept_no_effect``, checked."""
        values = {name: _text(field) for name, field in self._fields.items()}
        version = values.get("expected_version")
        if version is not None and not _VERSION.fullmatch(version):
            raise InvalidRequest("expected_version must be 64 hex digits", param="expected_version")
        if "name" not in values:
            raise InvalidRequest("name is required", param="name", code="missing_required_parameter")
        flags = {name: _flag(name, values.get(name)) for name in _FLAGS}
        return {"name": validate_name(values["name"]), "expected_version": version, **flags}

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise InvalidRequest(f"the form has more than {MAX_PARTS} parts; send an archive", param="files")
        self._part = _Part()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._part.header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._part.header_value += data[start:end]

    def _count_header(self, size: int) -> None:
        self._part.num_header_bytes += size
        if self._part.num_header_bytes > MAX_HEADER_BYTES:
            raise InvalidRequest(f"a part has more than {MAX_HEADER_BYTES} bytes of headers", code="invalid_multipart")

    def _header_end(self) -> None:
        part = self._part
        part.headers[part.header_name.lower()] = part.header_value
        part.header_name = part.header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._part.headers.get(b"content-disposition", b""))
        name = _printable(options.get(b"name", b""))
        if name in _FIELDS:
            self._sink = self._new_field(name)
        elif name == "files":
            self._sink = self._new_file(_file_name(options))
        elif name == "archive":
            self._sink = self._new_archive()
        else:
            known = ", ".join((*_FIELDS, "files", "archive"))
            raise InvalidRequest(f"the form has a field {name}; it may have {known}", param=name)

    def _new_field(self, name: str) -> _TextField:
        if name in self._fields:
            raise InvalidRequest(f"{name} appears twice in the form", param=name)
        self._fields[name] = _TextField(name)
        return self._fields[name]

    def _new_file(self, name: str) -> _Sink:
        if self._has_archive:
            raise InvalidRequest("send either files or one archive", param="files")
        self._num_files += 1
        return self._open.enter_context(self._staged.writer(name))

    def _new_archive(self) -> _Sink:
        if self._has_archive or self._num_files:
            raise InvalidRequest("send either files or one archive", param="archive")
        self._has_archive = True
        return self._open.enter_context(self._staged.archive_writer())

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(data[start:end])

    def _end(self) -> None:
        self._sink = None
        self._open.close()  # the file of this part; the stack can be used again

    def _all_read(self) -> None:
        self._is_complete = True


def _file_name(options: dict[bytes, bytes]) -> str:
    name = options.get(b"filename", b"")
    if not name:
        raise InvalidRequest("each part 'files' needs a filename", param="files")
    return name.decode("utf-8", "replace")


def _printable(name: bytes) -> str:
    return name[:64].decode("ascii", "backslashreplace") or "without a name"


def _text(field: _TextField) -> str:
    try:
        return field.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{field.name} is not UTF-8", param=field.name) from error


def _flag(name: str, value: str | None) -> bool:
    if value not in (None, "true", "false"):
        raise InvalidRequest(f"{name} must be true or false", param=name)
    return value == "true"
