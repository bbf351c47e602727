"""Sends a plan over HTTP and nothing else, and writes down what came back and when.

Times are seconds of a monotonic clock since the start of the run. TTFT counts from the *scheduled* arrival, so that a
client that falls behind shows up in the figures instead of hiding them (coordinated omission).
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp

from loadtest.workload import PlannedRequest


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


async def list_models(session: aiohttp.ClientSession, url: str) -> tuple[str, list[str]]:
    """The base's name and the adapters' names, as ``/v1/models`` lists them."""
    async with session.get(f"{url}/v1/models") as response:
        response.raise_for_status()
        models = (await response.json())["data"]
    bases = [model["id"] for model in models if not model.get("parent")]
    if not bases:
        raise ValueError(f"{url}/v1/models lists no base model")
    return bases[0], sorted(model["id"] for model in models if model.get("parent"))


async def ask(session: aiohttp.ClientSession, url: str, answer: Answer, start: float, ignore_eos: bool) -> None:
    """One streamed, greedy completion; fills ``answer``. Never raises for what the server did."""
    request = answer.request
    body = {
        "model": request.model,
        "prompt": request.prompt,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer.sent = time.monotonic() - start
    is_done = False
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            answer.status = response.status
            answer.version = response.headers.get("x-adapter-version", "")
            if response.status != 200:
                answer.error = f"{response.status} {(await response.text())[:200]}"
                return
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    is_done = True
                    break
                _take(answer, json.loads(line[6:]), time.monotonic() - start)
    except (aiohttp.ClientError, TimeoutError, ValueError) as failure:
        answer.error = f"{type(failure).__name__}: {failure}"
    finally:
        answer.finished = time.monotonic() - start
        if answer.error is None and not is_done:
            answer.error = "the stream ended without [DONE]"


def _take(answer: Answer, event: dict, now: float) -> None:
    if "error" in event:
        answer.error = str(event["error"].get("message"))
        return
    if event.get("usage"):
        answer.completion_tokens = event["usage"]["completion_tokens"]
    for choice in event.get("choices", ()):
        if choice.get("text"):
            answer.text += choice["text"]
            answer.token_times.append(now)


async def _watch_lag(stop: asyncio.Event) -> float:
    worst = 0.0
    while not stop.is_set():
        before = time.monotonic()
        await asyncio.sleep(0.02)
        worst = max(worst, time.monotonic() - before - 0.02)
    return worst


async def run(
    session: aiohttp.ClientSession, url: str, planned: Sequence[PlannedRequest], *, ignore_eos: bool = False
) -> RunResult:
    """Sends every request at its time, whatever the others do, and waits for all answers."""
    start, cpu = time.monotonic(), time.process_time()
    stop = asyncio.Event()
    watch = asyncio.create_task(_watch_lag(stop))

    async def send(request: PlannedRequest) -> Answer:
        await asyncio.sleep(max(0.0, request.at_seconds - (time.monotonic() - start)))
        answer = Answer(request)
        await ask(session, url, answer, start, ignore_eos)
        return answer

    answers = list(await asyncio.gather(*(send(request) for request in planned)))
    wall = time.monotonic() - start
    stop.set()
    return RunResult(answers, wall, await watch, time.process_time() - cpu)
