"""A server of the OpenAI surface without a model: answers are a function of adapter and prompt, times are scripted.

Runs in the test's process (``application``), or as a process of its own like a peer (``python fake_peer.py --port N``).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web

LETTERS = "abcdefghijklmnop"
SEEN: web.AppKey[list[dict]] = web.AppKey("seen", list)
"""Where an application keeps the bodies of the completions it was asked for."""


def answer_text(model: str, prompt: object, step: int) -> str:
    """One token's text: two letters that depend on everything that was asked."""
    digest = hashlib.sha256(json.dumps([model, prompt, step]).encode()).digest()
    return LETTERS[digest[0] % 16] + LETTERS[digest[1] % 16]


def application(
    adapters: Sequence[str] = (),
    *,
    token_seconds: float = 0.001,
    text_of: Callable[[str, object, int], str] = answer_text,
    fail_every: int = 0,
) -> web.Application:
    """``fail_every`` n: each n-th completion is answered 429. Requests of all kinds are noted in ``app[SEEN]``."""
    seen: list[dict] = []
    held = dict.fromkeys(adapters, True)

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        seen.append(body)
        if fail_every and len(seen) % fail_every == 0:
            return web.json_response({"error": {"message": "queue full"}}, status=429)
        if body["model"] not in ("small", *held):
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        response = web.StreamResponse(headers={"x-adapter-version": "v1", "content-type": "text/event-stream"})
        await response.prepare(request)
        for step in range(body["max_tokens"]):
            await asyncio.sleep(token_seconds)
            event = {"choices": [{"index": 0, "text": text_of(body["model"], body["prompt"], step)}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
        await response.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def models(_: web.Request) -> web.Response:
        listed = [{"id": "small", "parent": None}, *({"id": name, "parent": "small"} for name in held)]
        return web.json_response({"data": listed})

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "0-fake"})

    app = web.Application()
    app[SEEN] = seen
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/version", version)
    app.router.add_get("/health", version)
    return app


def main() -> None:
    """``--journal FILE`` gets a line with the time at start and at the end; ``--die`` ends before it is ready."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", default="fake")
    parser.add_argument("--adapters", default="")
    parser.add_argument("--token-seconds", type=float, default=0.001)
    parser.add_argument("--mistaken", action="store_true", help="every adapter answers as the first one")
    parser.add_argument("--forgetful", action="store_true", help="the same request is answered another way each time")
    parser.add_argument("--journal", type=Path, default=None)
    parser.add_argument("--die", action="store_true")
    given = parser.parse_args()
    if given.die:
        raise SystemExit("fake peer: told to die")
    adapters = tuple(name for name in given.adapters.split(",") if name)
    asked = 0

    def text_of(model: str, prompt: object, step: int) -> str:
        nonlocal asked
        asked += given.forgetful
        return answer_text(adapters[0] if given.mistaken and model in adapters else model, prompt, step + 1000 * asked)

    def note(what: str) -> None:
        if given.journal:
            with given.journal.open("a") as journal:
                journal.write(f"{what} {given.name} {time.monotonic()}\n")

    note("start")
    app = application(adapters, token_seconds=given.token_seconds, text_of=text_of)
    web.run_app(app, host="127.0.0.1", port=given.port, print=None)
    note("end")


if __name__ == "__main__":
    main()
