"""Sends a plan over HTTP and nothing else, and writes down what came back and when.

Times are seconds of a monotonic clock since the start of the run. In an open loop TTFT counts from the *scheduled*
arrival, so that a client that falls behind shows up in the figures instead of hiding them (coordinated omission); in a
closed loop the scheduled arrival is the moment of sending.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from loadtest.workload import PlannedRequest


@dataclass(frozen=True, slots=True)
class Target:
    """One running server. Requests are OpenAI completions; servers differ in how a request names its adapter.

    ``selectors`` maps a model's name to the fields that choose it (``{"model": name}`` where it is not listed);
    ``fields`` go with every request.
    """

    url: str
    base: str
    adapters: tuple[str, ...] = ()
    selectors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    version: Mapping[str, Any] = field(default_factory=dict)

    def body(self, request: PlannedRequest, *, ignore_eos: bool) -> dict[str, Any]:
        return {
            **self.selectors.get(request.model, {"model": request.model}),
            "prompt": list(request.prompt) if isinstance(request.prompt, tuple) else request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.fields,
        }


@dataclass(slots=True)
class Answer:
    """What one request got. ``token_times`` are arrivals of non-empty text chunks; ``error`` is None on success."""

    request: PlannedRequest
    sent: float = 0.0
    finished: float = 0.0
    status: int = 0
    version: str = ""
    text: str = ""
    token_times: list[float] = field(default_factory=list)
    completion_tokens: int = 0
    error: str | None = None
    raw: list[tuple[float, bytes]] = field(default_factory=list, repr=False)

    def settle(self) -> None:
        """Reads the events out of what was received; a token's time is that of the bytes that completed its event."""
        rest, is_done, raw, self.raw = b"", False, self.raw, []
        try:
            for now, received in raw:
                *lines, rest = (rest + received).split(b"\n")
                for line in lines:
                    if line.strip() == b"data: [DONE]":
                        is_done = True
                    elif line.startswith(b"data: "):
                        self._take(json.loads(line[6:]), now)
        except ValueError as failure:
            self.error = self.error or f"{type(failure).__name__}: {failure}"
        if self.error is None and not is_done:
            self.error = "the stream ended without [DONE]"

    def _take(self, event: dict, now: float) -> None:
        if "error" in event:
            self.error = self.error or str(event["error"].get("message"))
            return
        if event.get("usage"):
            self.completion_tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            if choice.get("text"):
                self.text += choice["text"]
                self.token_times.append(now)

    @property
    def is_ok(self) -> bool:
        return self.error is None

    @property
    def ttft_seconds(self) -> float | None:
        return self.token_times[0] - self.request.at_seconds if self.token_times else None

    @property
    def itl_seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time per token after the first; also right for a server that sends several tokens in one chunk."""
        if len(self.token_times) < 2 or self.completion_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.completion_tokens - 1)

    @property
    def e2e_seconds(self) -> float:
        return self.finished - self.request.at_seconds


@dataclass(slots=True)
class RunResult:
    """All answers of a run, its wall time, and how late the client's own event loop ran (its health)."""

    answers: list[Answer]
    wall_seconds: float
    max_lag_seconds: float
    client_cpu_seconds: float


def require_loopback(url: str) -> None:
    """Load goes to this machine only: raises ``ValueError`` for any other host."""
    host = urlsplit(url).hostname or ""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ValueError(f"{url} is not on this machine; the load test talks to 127.0.0.1 or localhost only")


@asynccontextmanager
async def open_session(*, api_key: str | None = None, timeout_seconds: float = 300.0) -> AsyncIterator[Any]:
    """A session without a limit of connections, so that the client never queues what the server should."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=timeout_seconds)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        yield session


async def find_target(session: aiohttp.ClientSession, url: str) -> Target:
    """The server at ``url`` as ``/v1/models`` and ``/version`` describe it.

    Raises ``ValueError`` for another machine or a server without a base, ``aiohttp.ClientError`` without an answer.
    """
    require_loopback(url)
    base, adapters = await list_models(session, url)
    async with session.get(f"{url}/version") as response:
        version: dict[str, Any] = await response.json()
    return Target(url, base, tuple(adapters), version=version)


async def list_models(session: aiohttp.ClientSession, url: str) -> tuple[str, list[str]]:
    """The base's name and the adapters' names, as ``/v1/models`` lists them."""
    async with session.get(f"{url}/v1/models") as response:
        response.raise_for_status()
        models = (await response.json())["data"]
    bases = [model["id"] for model in models if not model.get("parent")]
    if not bases:
        raise ValueError(f"{url}/v1/models lists no base model")
    return bases[0], sorted(model["id"] for model in models if model.get("parent"))


async def ask(
    session: aiohttp.ClientSession,
    target: Target,
    answer: Answer,
    start: float,
    ignore_eos: bool,
    *,
    settled: bool = True,
) -> None:
    """One streamed, greedy completion; fills ``answer``. Never raises for what the server did.

    A server may close a connection that was idle just when a request is sent over it (llama.cpp's does). Such a request
    goes once more over a new connection, as every client library sends it; the lost time counts.

    With ``settled`` False the caller settles the answer when the run is over: reading JSON during it would take time
    from a server on the same cores.
    """
    body = target.body(answer.request, ignore_eos=ignore_eos)
    answer.sent = time.monotonic() - start
    try:
        try:
            await _receive(session, target, body, answer, start)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if answer.status:
                raise
            await _receive(session, target, body, answer, start)
    except (aiohttp.ClientError, TimeoutError, ValueError) as failure:
        answer.error = f"{type(failure).__name__}: {failure}"
    finally:
        answer.finished = time.monotonic() - start
        if settled:
            answer.settle()


async def _receive(
    session: aiohttp.ClientSession, target: Target, body: dict[str, Any], answer: Answer, start: float
) -> None:
    async with session.post(f"{target.url}/v1/completions", json=body) as response:
        answer.status = response.status
        answer.version = response.headers.get("x-adapter-version", "")
        if response.status != 200:
            answer.error = f"{response.status} {(await response.text())[:200]}"
            return
        async for received in response.content.iter_any():
            answer.raw.append((time.monotonic() - start, received))


async def _watch_lag(stop: asyncio.Event) -> float:
    worst = 0.0
    while not stop.is_set():
        before = time.monotonic()
        await asyncio.sleep(0.02)
        worst = max(worst, time.monotonic() - before - 0.02)
    return worst


@asynccontextmanager
async def _watched(result: RunResult) -> AsyncIterator[float]:
    """Yields the start of the run; fills in the client's own figures at its end, and settles the answers."""
    start, cpu = time.monotonic(), time.process_time()
    stop = asyncio.Event()
    watch = asyncio.create_task(_watch_lag(stop))
    try:
        yield start
    finally:
        result.wall_seconds = time.monotonic() - start
        stop.set()
        result.max_lag_seconds = await watch
        result.client_cpu_seconds = time.process_time() - cpu
        for answer in result.answers:
            answer.settle()


async def run(
    session: aiohttp.ClientSession, target: Target, planned: Sequence[PlannedRequest], *, ignore_eos: bool = False
) -> RunResult:
    """Open loop: sends every request at its time, whatever the others do, and waits for all answers."""
    result = RunResult([], 0.0, 0.0, 0.0)

    async def send(request: PlannedRequest, start: float) -> Answer:
        await asyncio.sleep(max(0.0, request.at_seconds - (time.monotonic() - start)))
        answer = Answer(request)
        await ask(session, target, answer, start, ignore_eos, settled=False)
        return answer

    async with _watched(result) as start:
        result.answers = list(await asyncio.gather(*(send(request, start) for request in planned)))
    return result


async def run_closed(
    session: aiohttp.ClientSession,
    target: Target,
    planned: Sequence[Sequence[PlannedRequest]],
    *,
    ignore_eos: bool = True,
    seconds: float | None = None,
) -> RunResult:
    """Closed loop: all streams start together, and each sends its next request when it has the answer to the last.

    With ``seconds`` no request is sent after that time; the answers under way are waited for.
    """
    result = RunResult([], 0.0, 0.0, 0.0)

    async def follow(requests: Sequence[PlannedRequest], start: float) -> list[Answer]:
        answers = []
        for request in requests:
            if seconds is not None and time.monotonic() - start > seconds:
                break
            answer = Answer(replace(request, at_seconds=time.monotonic() - start))
            await ask(session, target, answer, start, ignore_eos, settled=False)
            answers.append(answer)
        return answers

    async with _watched(result) as start:
        nested = await asyncio.gather(*(follow(requests, start) for requests in planned))
        result.answers = [answer for answers in nested for answer in answers]
    return result
