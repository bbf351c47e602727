"""The cost of HTTP: both sides do the same work in turns, and a side that fails is an error, never a figure."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loadtest import http_cost
from loadtest.lean_client import run_closed_loop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TEXT = b'data: {"choices":[{"text":"x"}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


def framed(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@contextmanager
def answering(answer: bytes, *, pieces: int = 1) -> Iterator[int]:
    """A server that sends ``answer`` to each request, cut in pieces, and hangs up if no stream ends so."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the client hangs up on what it cannot use
            while b"\r\n\r\n" in connection.recv(65536):
                size = max(1, -(-len(answer) // pieces))
                for start in range(0, len(answer), size):
                    connection.sendall(answer[start : start + size])
                if not answer.endswith(b"0\r\n\r\n"):
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_the_client_counts_what_the_usage_chunks_tell(pieces: int) -> None:
    with answering(HEAD + framed(*[TEXT] * 200, USAGE, DONE), pieces=pieces) as port:
        result = run_closed_loop(port, "base", [[[1, 2], [3]], [[4]]], 7)
    assert result.tokens == 3 * 7
    assert result.seconds > 0


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\n\r\n{}", "429"),
        (HEAD + framed(TEXT, b'data: {"error":{"message":"the step loop died"}}\n\n'), "step loop died"),
        (HEAD + framed(TEXT)[:-5], "a stream failed"),
        (HEAD + framed(TEXT, DONE), "without usage"),
        (b"", "a stream failed"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(answer: bytes, told: str) -> None:
    with answering(answer) as port, pytest.raises(RuntimeError, match=told):
        run_closed_loop(port, "base", [[[1]]], 7)


def side(tokens: int, seconds: float) -> dict[str, float]:
    cpu = {f"{name}_cpu_seconds": 0.1 for name in ("event_loop", "server", "client")}
    return {"tokens": tokens, "seconds": seconds, **cpu}


def test_cost_is_the_share_of_throughput_that_http_lost() -> None:
    made = http_cost.compare(0, ["http", "offline"], {"offline": side(100, 2.0), "http": side(100, 2.5)})
    assert made["cost"] == pytest.approx(0.2)
    assert made["event_loop_us_per_token"] == pytest.approx(1000)
    with pytest.raises(RuntimeError, match="cannot be compared"):
        http_cost.compare(0, ["http", "offline"], {"offline": side(100, 2.0), "http": side(99, 2.0)})


def test_no_two_prompts_are_alike_and_a_seed_gives_them_again() -> None:
    settings = http_cost.Settings(None, 8, 2, 16, 4, 1, 1, 5)
    first, second = (http_cost.plan_of(settings, 300, number) for number in (0, 1))
    prompts = [tuple(prompt) for plan in (first, second) for stream in plan for prompt in stream]
    assert len(set(prompts)) == len(prompts) == 32
    assert first == http_cost.plan_of(settings, 300, 0)


def test_a_small_run_of_the_embedded_base(tmp_path: Path) -> None:
    words = ["--concurrency", "3", "--requests-per-stream", "2", "--prompt-tokens", "5", "--max-tokens", "4"]
    out = tmp_path / "runs" / "cost.json"
    assert http_cost.main([*words, "--rounds", "2", "--threads", "1", "--seed", "7", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["parameters"]["seed"] == 7
    assert record["machine"]["cores"] >= 1
    assert "torch" in record["versions"]
    assert [sorted(each["order"]) for each in record["rounds"]] == [["http", "offline"]] * 2
    for each in record["rounds"]:
        assert {result["tokens"] for result in each["results"].values()} == {3 * 2 * 4}
        assert each["client_us_per_token"] > 0


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--concurrency", "-1"]])
def test_senseless_numbers_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        http_cost.main(words)
