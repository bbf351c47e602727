"""What handlers delegate to, as interfaces: the app is built from collaborators passed in, so tests pass fakes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from starlette.requests import Request

from deltaserve.api.keys import KeyRing
from deltaserve.config import ServeConfig
from deltaserve.core import EngineStatus, GenerationRequest, RequestOutput
from deltaserve.metrics import Metrics
from deltaserve.text import Tokenizer
from deltaserve_store.manifest import AdapterRecord
from deltaserve_store.names import NameMap, Resolved


class OutputStream(Protocol):
    """One submitted request. Leaving early (``abort`` or ``aclose``) frees its blocks and pins."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...
    async def __anext__(self) -> RequestOutput: ...
    def abort(self) -> None: ...
    def stop(self, index: int) -> None: ...
    def divert(self, sink: Callable[[RequestOutput], bool]) -> None: ...


class Limits(Protocol):
    @property
    def max_model_len(self) -> int: ...
    def check_ids(self, token_ids: Iterable[int], param: str, num_token_ids: int = 0) -> None: ...
    def check_num_parts(self, count: int) -> None: ...
    def check_num_members(self, count: int) -> None: ...


class GenerationEngine(Protocol):
    """The part of ``AsyncEngine`` that HTTP uses."""

    @property
    def limits(self) -> Limits: ...

    @property
    def base_fingerprint(self) -> str: ...

    @property
    def names(self) -> NameMap: ...
    def max_row_len(self, num_rows: int) -> int: ...
    def submit(self, request: GenerationRequest) -> OutputStream: ...
    def resolve(self, tenant: str, model: str) -> Resolved: ...
    def status(self) -> EngineStatus: ...
    async def stop(self, drain_seconds: float = ...) -> None: ...


class Door(Protocol):
    """The part of ``Admission`` that HTTP uses."""

    async def admit(
        self,
        staged_folder: Path,
        *,
        name: str,
        tenant: str = ...,
        expected_version: str | None = ...,
        accept_base: bool = ...,
        accept_no_effect: bool = ...,
        source: str = ...,
    ) -> Any: ...

    async def rollback(self, tenant: str, name: str, version: str | None = ...) -> AdapterRecord: ...
    async def alias(self, tenant: str, alias: str, target: str) -> None: ...
    async def delete(self, tenant: str, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Services:
    engine: GenerationEngine
    admission: Door
    store: Any
    tokenizer: Tokenizer
    metrics: Metrics
    config: ServeConfig
    keys: KeyRing | None = None


def services_of(request: Request) -> Services:
    return cast(Services, request.app.state.services)
