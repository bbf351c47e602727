"""Receiving an adapter: a form streamed into staging, then the door, then an answer at once or later.

A proof can take longer than a client waits. After ``ANSWER_SECONDS`` (or at once, with ``Prefer: respond-async``) the
answer is 202 with an address that tells how it ended.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from starlette.requests import Request

from deltaserve.api.body import drain, receive_chunks
from deltaserve.api.errors import UnsupportedMediaType, internal_error, log
from deltaserve.api.keys import Caller
from deltaserve.api.services import Services
from deltaserve.api.upload_form import UploadForm, boundary_of
from deltaserve.errors import BodyTooLarge, DeltaserveError, NotFound, QueueFull
from deltaserve_store.errors import StoreError
from deltaserve_store.staging import StagedUpload, Staging

ANSWER_SECONDS = 300.0
MAX_CONCURRENT_UPLOADS = 8
MAX_REMEMBERED = 256
_DRAIN_BYTES = 8 << 20
Result = TypeVar("Result")


@dataclass(slots=True)
class Upload:
    """One upload from its first byte to the door's verdict."""

    id: str
    tenant: str
    num_bytes: int = 0
    name: str = ""
    verdict: asyncio.Future[Any] | None = None


class Uploads:
    """Uploads under way, of which there are few at once, and the last ones that outlived their request."""

    def __init__(self, limit: int = MAX_CONCURRENT_UPLOADS) -> None:
        self._limit = limit
        self._num_open = 0
        self._remembered: OrderedDict[str, Upload] = OrderedDict()
        # Threads of their own: archives that take minutes must not hold up the encoding of somebody's long prompt.
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="upload")

    async def receive(self, http: Request, services: Services, caller: Caller) -> Upload:
        """Stages the form's files and begins admission. ``verdict`` becomes the door's ``AdmissionResult``."""
        if self._num_open >= self._limit:
            raise QueueFull(f"{self._limit} uploads are under way already; try again", retry_after_seconds=5)
        self._num_open += 1
        upload = Upload(f"upload-{secrets.token_hex(12)}", caller.tenant)
        staged: StagedUpload | None = None
        try:
            staged = await self._run(Staging(services.store).open)
            form = await self._receive(http, staged, services.config.max_upload_bytes, upload)
        except BaseException as error:
            await self._close(staged)
            _count(services, upload, error)
            raise
        upload.name = form["name"]
        upload.verdict = asyncio.ensure_future(self._admit(services, upload, staged, form))
        return upload

    def remember(self, upload: Upload) -> None:
        """Keeps an upload for later questions; the oldest is forgotten when there are too many."""
        self._remembered[upload.id] = upload
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def find(self, upload_id: str, caller: Caller) -> Upload:
        upload = self._remembered.get(upload_id)
        if upload is None or upload.tenant != caller.tenant:
            raise NotFound("no such upload; the last few are remembered until the server stops", param="id")
        return upload

    async def _admit(self, services: Services, upload: Upload, staged: StagedUpload, form: dict[str, Any]) -> Any:
        try:
            result = await services.admission.admit(staged.folder, tenant=upload.tenant, source="upload", **form)
        except BaseException as error:
            _count(services, upload, error)
            if not isinstance(error, DeltaserveError | StoreError | asyncio.CancelledError):
                log.exception("unexpected error at the door")
                raise internal_error() from error
            raise
        finally:
            await self._close(staged)
        services.metrics.on_upload("created" if result.created else "unchanged", upload.num_bytes)
        return result

    async def _close(self, staged: StagedUpload | None) -> None:
        self._num_open -= 1
        if staged is not None:
            await self._run(staged.discard)

    async def _run(self, work: Callable[[], Result]) -> Result:
        """``work`` on an upload thread: whatever touches the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _receive(self, http: Request, staged: StagedUpload, max_bytes: int, upload: Upload) -> dict[str, Any]:
        """The form's fields as arguments of ``admit``; its files are in ``staged`` then."""
        boundary = boundary_of(http.headers.get("content-type", ""))
        if boundary is None:
            raise UnsupportedMediaType("send the adapter as multipart/form-data with a boundary of 1 to 70 characters")
        stream = receive_chunks(http)
        with UploadForm(staged, boundary) as form:
            try:
                async for chunk in stream:
                    upload.num_bytes += len(chunk)
                    if upload.num_bytes > max_bytes:
                        raise BodyTooLarge(f"the upload has more than {max_bytes} bytes, the most this server takes")
                    await self._run(partial(form.feed, chunk))
                await self._run(form.finish)
            except (DeltaserveError, StoreError):
                await drain(stream, _DRAIN_BYTES)
                raise
        return form.arguments()


def uploads_of(http: Request) -> Uploads:
    return cast(Uploads, http.app.state.uploads)


async def is_settled(upload: Upload, seconds: float) -> bool:
    """Whether the verdict is there within that time. The upload goes on whoever stops waiting."""
    verdict = _future(upload)
    await asyncio.wait({verdict}, timeout=seconds)
    return verdict.done()


def verdict_of(upload: Upload) -> Any:
    """The settled verdict. Raises what the door raised."""
    return _future(upload).result()


def _future(upload: Upload) -> asyncio.Future[Any]:
    if upload.verdict is None:
        raise RuntimeError("the upload was not received")
    return upload.verdict


def wait_seconds(http: Request) -> float:
    """How long the client wants to wait for the verdict (RFC 7240)."""
    preferences = {part.strip().lower() for part in http.headers.get("prefer", "").split(",")}
    return 0.0 if "respond-async" in preferences else ANSWER_SECONDS


def _count(services: Services, upload: Upload, error: BaseException) -> None:
    if isinstance(error, DeltaserveError | StoreError) and error.status < 500:
        codes = [reason.code for reason in error.reasons] or [error.error_code]
        services.metrics.on_upload("refused", upload.num_bytes, codes)
    else:
        services.metrics.on_upload("failed", upload.num_bytes)
