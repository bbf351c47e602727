"""The cost of HTTP: both sides do the same work in turns, and a side that fails is an error, never a figure."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtest import offline
from loadtest.lean_client import run_closed_loop
from loadtest.peers.peer import PeerFailed
from loadtest.tables import render

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


def requests(*counts: int) -> list[list[dict[str, Any]]]:
    """As many requests for each stream."""
    return [[{"model": "base", "prompt": [1, 2], "max_tokens": 7}] * count for count in counts]


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_the_client_counts_what_the_usage_chunks_tell(pieces: int) -> None:
    with answering(HEAD + framed(*[TEXT] * 200, USAGE, DONE), pieces=pieces) as port:
        result = run_closed_loop(port, requests(2, 1))
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
        run_closed_loop(port, requests(1))


def side(tokens: int, seconds: float, cpu: float) -> dict[str, float]:
    return {
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "event_loop_cpu_seconds": 0.2,
        "client_cpu_seconds": 0.4,
    }


def test_what_http_took_of_the_processor_and_of_the_throughput() -> None:
    made = offline.compare(0, ["http", "offline"], {"offline": side(100, 2.0, 3.0), "http": side(100, 2.5, 4.0)})
    assert made["cost"] == pytest.approx(0.2)
    assert made["cpu_cost"] == pytest.approx(0.25)  # the client's CPU time is not the server's cost
    assert made["waiting"] == pytest.approx(0.2 - (1 - 3.0 / 4.4))
    assert made["client_share_of_a_core"] == pytest.approx(0.16)
    assert made["cpu_us_per_token"] == pytest.approx(
        {"offline": 30_000, "server": 40_000, "event_loop": 2_000, "client": 4_000}
    )
    with pytest.raises(PeerFailed, match="cannot be compared"):
        offline.compare(0, ["http", "offline"], {"offline": side(100, 2.0, 3.0), "http": side(99, 2.0, 3.0)})


def test_a_system_that_tells_no_cpu_time_still_gives_the_throughput() -> None:
    nothing = {"cpu_seconds": 0.0, "event_loop_cpu_seconds": 0.0, "client_cpu_seconds": 0.0}
    results = {name: side(100, seconds, 0.0) | nothing for name, seconds in (("offline", 2.0), ("http", 2.5))}
    made = offline.compare(0, ["offline", "http"], results)
    assert (made["cost"], made["cpu_cost"]) == (pytest.approx(0.2), 0.0)


def test_no_two_prompts_are_alike_and_a_seed_gives_them_again() -> None:
    given = offline.arguments().parse_args(["--concurrency", "8", "--seed", "5", "--prompt-tokens", "16"])
    warm, first, second, again = (offline.plan_of(given, ["a", "b"], (0, 300), number, 4) for number in (-1, 0, 1, 0))
    asked = [tuple(request["prompt"]) for plan in (warm, first, second) for own in plan for request in own]
    assert len(set(asked)) == len(asked) == 3 * 16
    assert first == again
    assert {request["model"] for own in first for request in own} == {"a", "b"}


def test_the_embedded_base_needs_no_fixture(tmp_path: Path) -> None:
    words = ["--concurrency", "3", "--requests-per-stream", "2", "--prompt-tokens", "5", "--max-tokens", "4"]
    words += ["--rounds", "2", "--threads", "1", "--seed", "7"]
    out = tmp_path / "out"
    assert offline.main([*words, "--work", str(tmp_path / "work"), "--out", str(out)]) == 0
    record = json.loads((out / "record.json").read_text())
    assert (record["seed"], record["parameters"]["base"]) == (7, "embedded")
    assert [sorted(each["order"]) for each in record["rounds"]] == [["http", "offline"]] * 2
    for each in record["rounds"]:
        assert {result["tokens"] for result in each["results"].values()} == {3 * 2 * 4}
        us = each["cpu_us_per_token"]
        assert us["server"] > us["event_loop"] > 0
        assert us["offline"] > 0
        assert us["client"] > 0
    assert "| of it the event loop's thread |" in render(record)


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--concurrency", "-1"]])
def test_senseless_numbers_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        offline.main(words)


def test_a_folder_that_is_no_fixture_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert offline.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no fixture" in capsys.readouterr().err


def test_a_record_shows_both_costs_and_an_older_one_without_cpu_times_its_throughput() -> None:
    results = [
        {"offline": side(100, 2.0, 3.0), "http": side(100, 2.5, 4.0)},
        {"offline": side(100, 2.0, 3.0), "http": side(100, 4.0, 5.0)},
    ]
    rounds = [offline.compare(number, ["offline", "http"], each) for number, each in enumerate(results)]
    machine = {"processor": "Abacus 3", "cores": 2, "memory_bytes": 8 << 30, "system": "Linux", "python": "3.11"}
    parameters = {"concurrency": 2, "prompt_tokens": 3, "max_tokens": 4, "num_adapters": 5}
    head = {"kind": "offline", "taken_at": "now", "seed": 7, "versions": {}, "machine": machine}
    shown = render({**head, "parameters": parameters, "rounds": rounds})
    assert "| tokens/s | 50 | 32 [25–40] | 0.65 [0.50–0.80] |" in shown.replace("50 [50–50]", "50")
    assert "| CPU µs a token | 30,000 [30,000–30,000] | 45,000 [40,000–50,000] | 0.68 [0.60–0.75] |" in shown
    assert "**HTTP took 32.5 [25.0–40.0] % of the server's CPU time and 35.0 [20.0–50.0] % of the throughput**" in shown
    older = [{"results": each["results"]} for each in rounds]
    assert "CPU" not in render({**head, "parameters": parameters, "rounds": older})
