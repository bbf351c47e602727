"""The client against a scripted server: latencies, failures and wrong answers must all show in the report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

from loadtest.client import Answer, Target, ask, open_session, require_loopback
from loadtest.load import arguments, main
from loadtest.workload import PlannedRequest

CHUNKS = 3


def scripted(text_of: Callable[[dict, int], str], *, fail_every: int = 0, cut_every: int = 0) -> web.Application:
    """A server that streams ``text_of(body, number of the request)`` in three chunks 10 ms apart."""
    seen = 0

    async def completions(request: web.Request) -> web.StreamResponse:
        nonlocal seen
        seen += 1
        number = seen
        body = await request.json()
        if fail_every and number % fail_every == 0:
            return web.json_response({"error": {"message": "queue full", "code": "queue_full"}}, status=429)
        response = web.StreamResponse(headers={"x-adapter-version": "v1", "content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(CHUNKS):
            await asyncio.sleep(0.01)
            event = {"choices": [{"index": 0, "text": text_of(body, number)}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if cut_every and number % cut_every == 0:
            return response
        usage = {"choices": [], "usage": {"completion_tokens": CHUNKS}}
        await response.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "base", "parent": None}, {"id": "a", "parent": "base"}]})

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "0"})

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/version", version)
    return app


async def drive(app: web.Application, out: Path) -> tuple[int, dict]:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        options = ["--url", f"http://127.0.0.1:{port}", "--rate", "40", "--seconds", "1", "--num-prompts", "2"]
        code = await main(arguments().parse_args([*options, "--base-share", "0.5", "--out", str(out)]))
    finally:
        await runner.cleanup()
    return code, json.loads((out / "report.json").read_text())


async def honest(tmp_path: Path) -> tuple[int, dict]:
    return await drive(scripted(lambda body, _: f"{body['model']}:{body['prompt']} "), tmp_path)


def test_an_honest_server_passes_and_its_figures_are_those_of_the_script(tmp_path: Path) -> None:
    code, report = asyncio.run(honest(tmp_path))
    assert code == (3 if report["client"]["is_saturated"] else 0)
    assert report["num_succeeded"] == report["num_requests"] > 10
    assert report["completion_tokens"] == CHUNKS * report["num_requests"]
    assert report["correctness"]["num_checked"] == report["num_requests"]
    assert report["correctness"]["mismatches"] == []
    for kind in ("base", "adapter"):
        latency = report["latency"][kind]
        assert latency["ttft_seconds"]["p50"] >= 0.01
        assert latency["itl_seconds"]["p50"] >= 0.009
        assert latency["e2e_seconds"]["p50"] >= latency["ttft_seconds"]["p50"] + 0.018
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_an_answer_that_changes_under_load_is_found(tmp_path: Path) -> None:
    app = scripted(lambda body, number: "odd" if body["model"] == "a" and number % 5 == 0 else "even")
    code, report = asyncio.run(drive(app, tmp_path))
    assert code == 1
    assert {model for model, _ in report["correctness"]["mismatches"]} == {"a"}


def test_a_connection_closed_while_idle_costs_no_answer_but_one_closed_in_an_answer_does() -> None:
    answers = asyncio.run(two_requests(b"data: [DONE]\n\n"))
    assert [answer.status for answer in answers] == [200, 200]
    assert not any(answer.error and "Disconnected" in answer.error for answer in answers)
    broken = asyncio.run(two_requests(None))
    assert all(answer.status == 200 and "ClientPayloadError" in str(answer.error) for answer in broken)


async def two_requests(content: bytes | None) -> list[Answer]:
    """Of one session, to a server that offers to keep the connection and closes it when the next request comes; with
    None it closes within the answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(
            next(line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        )
        await reader.readexactly(length)
        promised = 100 if content is None else len(content)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % promised + (content or b""))
        await writer.drain()
        if content is not None:
            await reader.read(1)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    target = Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "base")
    answers = [Answer(PlannedRequest(i, 0.0, "base", "x", 1)) for i in range(2)]
    async with server, open_session() as session:
        for answer in answers:
            await ask(session, target, answer, 0.0, True)
    return answers


def test_refusals_and_cut_streams_are_failures_not_answers(tmp_path: Path) -> None:
    app = scripted(lambda body, _: "same", fail_every=4, cut_every=5)
    _, report = asyncio.run(drive(app, tmp_path))
    failed = report["num_requests"] - report["num_succeeded"]
    assert failed == sum(report["failures"].values()) > 0
    assert any(failure.startswith("429") for failure in report["failures"])
    assert "the stream ended without [DONE]" in report["failures"]


@pytest.mark.parametrize("url", ["http://example.com", "http://10.0.0.1:8000", "http://0.0.0.0:8000", "nonsense"])
def test_only_this_machine_is_loaded(url: str) -> None:
    with pytest.raises(ValueError, match="this machine"):
        require_loopback(url)
