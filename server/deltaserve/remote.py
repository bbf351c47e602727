"""The adapter routes of a running server, as a client sees them. Standard library only; files are streamed.

Every failure comes back as the same typed error that the server raised, so callers need one way of handling both.
"""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from deltaserve.errors import DeltaserveError, InvalidRequest, Reason, Unavailable, error_class

CHUNK_BYTES = 1 << 20
MAX_RESPONSE_BYTES = 64 << 20
POLL_SECONDS = 2.0
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")


class RemoteServer:
    """One server by its URL (``http://host:port``). Methods block; each opens and closes its own connection.

    ``timeout_seconds`` bounds each wait for the network, and must cover the proof of an upload.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_seconds: float = 600.0) -> None:
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number, half an IPv6 address
            is_address = False
        if not is_address or parts.query or parts.fragment:
            raise InvalidRequest(f"The server address {url!r} is not of the form http://HOST:PORT.", param="server")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InvalidRequest("The API key holds characters that no key has.", param="api_key")
        self._is_tls = parts.scheme == "https"
        self._netloc = parts.netloc.rpartition("@")[2]
        self._prefix = parts.path.rstrip("/")
        self._api_key = api_key
        self._timeout_seconds = timeout_seconds

    def upload(
        self,
        path: Path | Sequence[Path],
        name: str,
        *,
        expected_version: str | None = None,
        accept_base: bool = False,
        accept_no_effect: bool = False,
    ) -> dict[str, Any]:
        """Send a folder (its plain files), chosen files or one archive through the door; returns the admitted adapter.

        ``created`` is True for a new version and False where the server already had these bytes under the name. A
        server whose proof takes long answers 202 first; then its verdict is waited for.
        Raises ``AdapterRefused`` with every reason, ``Conflict``, ``StorageFull``, ``QueueFull``, ``InvalidRequest``.
        """
        fields = {"name": name}
        if expected_version is not None:
            fields["expected_version"] = expected_version
        if accept_base:
            fields["accept_base"] = "true"
        if accept_no_effect:
            fields["accept_no_effect"] = "true"
        boundary = f"deltaserve-{secrets.token_hex(16)}"
        heads, files = _multipart(fields, upload_files(path), boundary)
        length = sum(len(head) for head in heads) + sum(file.stat().st_size for file in files)
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": str(length)}
        status, answer = self._call("POST", "/v1/adapters", _stream(heads, files), headers)
        while status == 202:
            time.sleep(POLL_SECONDS)
            status, answer = self._call("GET", f"/v1/uploads/{_quoted(str(answer.get('id')))}")
        return {**answer, "created": status != 200}

    def list(self, *, limit: int = 100) -> Iterator[dict[str, Any]]:
        """Every adapter, page after page."""
        after: str | None = None
        while True:
            query = urlencode({"limit": limit} | ({"after": after} if after else {}))
            page = self._get(f"/v1/adapters?{query}")
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            after = page.get("last_id") or page["data"][-1]["id"]

    def show(self, name: str) -> dict[str, Any]:
        return self._get(f"/v1/adapters/{_quoted(name)}")

    def versions(self, name: str) -> Sequence[dict[str, Any]]:
        return self._get(f"/v1/adapters/{_quoted(name)}/versions")["data"]

    def delete(self, name: str) -> dict[str, Any]:
        return self._call("DELETE", f"/v1/adapters/{_quoted(name)}")[1]

    def rollback(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Move the name to ``version`` (a digest or its prefix), or to the one before the current."""
        return self._send_json(
            "POST", f"/v1/adapters/{_quoted(name)}/rollback", {"version": version} if version else {}
        )

    def alias(self, alias: str, target: str) -> dict[str, Any]:
        """Point an alias at an adapter name or version; made where it does not exist."""
        return self._send_json("PUT", f"/v1/aliases/{_quoted(alias)}", {"target": target})

    def version(self) -> dict[str, Any]:
        """``version`` of the program, ``base`` and ``base_fingerprint``."""
        return self._get("/version")

    def _get(self, path: str) -> dict[str, Any]:
        return self._call("GET", path)[1]

    def _send_json(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._call(method, path, json.dumps(body).encode(), {"Content-Type": "application/json"})[1]

    def _call(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        connect = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        connection = connect(self._netloc, timeout=self._timeout_seconds)
        sent = {"Accept": "application/json", **(headers or {})}
        if self._api_key is not None:
            sent["Authorization"] = f"Bearer {self._api_key}"
        try:
            try:
                connection.request(method, self._prefix + path, body=body, headers=sent)
            except (BrokenPipeError, ConnectionResetError):
                # A server may refuse an upload before it has all of it; its answer is then waiting to be read.
                if connection.sock is None:
                    raise
            response = connection.getresponse()
            raw = response.read(MAX_RESPONSE_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            kind = type(error).__name__
            raise Unavailable(f"The server at {self._netloc} did not answer ({kind}); is it running?") from error
        finally:
            connection.close()
        return response.status, _parse(response.status, raw)


def upload_files(path: Path | Sequence[Path]) -> list[tuple[str, Path]]:
    """(form field, file) of every file to send. Raises ``InvalidRequest`` where ``path`` cannot be an upload."""
    if not isinstance(path, Path):
        return [("files", file) for file in path]
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        if not files:
            raise InvalidRequest(f"The folder {path.name!r} holds no files.", param="files")
        return [("files", file) for file in files]
    if path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES):
        return [("archive", path)]
    raise InvalidRequest(
        f"{path.name!r} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)}).", param="files"
    )


def _quoted(name: str) -> str:
    return quote(name, safe="@")


def _multipart(
    fields: Mapping[str, str], files: Sequence[tuple[str, Path]], boundary: str
) -> tuple[list[bytes], list[Path]]:
    """Headers and files alternate: head, file, head, file, ..., closing line (RFC 7578)."""
    text = ""
    heads: list[bytes] = []
    for name, value in fields.items():
        text += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
    for field, file in files:
        if any(character in file.name for character in '"\r\n\\'):
            raise InvalidRequest(f"The file name {file.name!r} cannot be sent.", param="files")
        text += f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{file.name}"\r\n'
        text += "Content-Type: application/octet-stream\r\n\r\n"
        heads.append(text.encode())
        text = "\r\n"
    heads.append(f"{text}--{boundary}--\r\n".encode())
    return heads, [file for _, file in files]


def _stream(heads: Sequence[bytes], files: Sequence[Path]) -> Iterator[bytes]:
    for head, file in zip(heads, files, strict=False):
        yield head
        with file.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    yield heads[-1]


def _parse(status: int, raw: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(raw) if raw else {}
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise DeltaserveError(f"The server answered {status} with something that is not a JSON object.")
    if 200 <= status < 300:
        return answer
    error = answer.get("error")
    error = error if isinstance(error, dict) else {}
    raise error_class(status)(
        str(error.get("message") or f"The server answered {status}."),
        param=error.get("param"),
        code=error.get("code"),
        reasons=[_reason(entry) for entry in error.get("reasons", ()) if isinstance(entry, dict)],
    )


def _reason(entry: Mapping[str, Any]) -> Reason:
    return Reason(*(str(entry.get(field, "")) for field in ("code", "where", "found", "allowed")))
