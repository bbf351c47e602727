"""A real ``deltaserve serve`` process: commands find it, signals drain it, a kill loses nothing."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve import tinybase
from deltaserve.cli import main
from deltaserve.cli.server_process import bind
from deltaserve.config import ServeConfig
from deltaserve.model.identify import identify
from deltatest.base_specs import spec_of
from deltatest.peft_adapters import make_sparse

COMMAND = shutil.which("deltaserve", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
READY_SECONDS = 120.0


class ServerProcess:
    """One server; ``url`` once it listens."""

    def __init__(self, store: Path, log: Path, *options: str) -> None:
        self.log = log
        assert COMMAND, "the deltaserve command is not installed beside this interpreter"
        arguments = [COMMAND, "serve", "--port", "0", "--store", str(store), "--no-demo-adapters", *options]
        with log.open("wb") as sink:
            self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=sink, text=True)
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        found = re.search(r"http://\S+", first)
        assert found, f"no address in {first!r}; log: {log.read_text()}"
        self.url = found.group()

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)

    def complete(self, model: str, prompt: str = "Once") -> dict:
        connection = self.connect()
        body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        return json.loads(connection.getresponse().read())

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    started: list[ServerProcess] = []

    def start(*options: str) -> ServerProcess:
        started.append(ServerProcess(tmp_path / "store", tmp_path / f"server-{len(started)}.log", *options))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        if server.process.stdout is not None:
            server.process.stdout.close()


@pytest.fixture(scope="module")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two different sparse adapters for the embedded base."""
    model = AutoModelForCausalLM.from_pretrained(tinybase.CHECKPOINT, dtype=torch.float32)
    spec = spec_of(model, fingerprint=identify(tinybase.CHECKPOINT))
    folder = tmp_path_factory.mktemp("adapters")
    return [make_sparse(spec, folder / f"a{seed}", seed=seed, std=0.5) for seed in (1, 2)]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """A command in this process; its stdout."""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        if stopped.code:
            pytest.fail(capsys.readouterr().err)
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """A command that must fail with exit status 1 and one message; its stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("deltaserve: ")
    assert "Traceback" not in error
    return error


def test_small_writes_leave_at_once() -> None:
    """Else the second part of an answer, or the next token of a stream, waits until the client acknowledges the part
    before it, which clients put off for 40 ms."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind(ServeConfig(port=0)) as listener:
            async with await asyncio.start_server(look, sock=listener):
                with socket.create_connection(listener.getsockname()[:2]):
                    return await asyncio.wait_for(found, 10)

    assert asyncio.run(accepted()), "Nagle's algorithm is on"


def test_commands_find_the_server_of_the_store(
    serve: Callable[..., ServerProcess],
    adapter_folders: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve()
    store = tmp_path / "store"
    at = ("--store", store, "--json")
    first = json.loads(run(capsys, "adapters", "add", adapter_folders[0], "--name", "a", *at))
    second = json.loads(run(capsys, "adapters", "add", adapter_folders[1], "--name", "a", *at))
    assert first["created"]
    assert second["created"]
    assert first["version"] != second["version"]
    answers = {model: server.complete(model)["choices"][0]["text"] for model in ("tinybase", "a")}
    assert answers["a"] != answers["tinybase"]
    pinned = server.complete(f"a@{first['version'][:12]}")
    assert pinned["system_fingerprint"] == first["version"]

    run(capsys, "adapters", "alias", "production", "a", "--store", store)
    run(capsys, "adapters", "rollback", "a", "--store", store)
    assert server.complete("production")["system_fingerprint"] == first["version"]
    (listed,) = json.loads(run(capsys, "adapters", "list", *at))
    assert (listed["id"], listed["version"]) == ("a", first["version"])
    shown = json.loads(run(capsys, "adapters", "show", "a", *at))
    assert {record["version"] for record in shown["versions"]} == {first["version"], second["version"]}
    assert json.loads(run(capsys, "adapters", "show", "production", *at)) == shown

    other = subprocess.run(
        [str(COMMAND), "serve", "--port", "0", "--store", str(store)], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert f"in use by process {server.process.pid} at {server.url}" in other.stderr


def test_sigterm_lets_a_running_answer_finish(serve: Callable[..., ServerProcess]) -> None:
    server = serve()
    connection = server.connect()
    body = {"model": "tinybase", "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    first = response.readline()
    server.process.send_signal(signal.SIGTERM)
    rest = response.read().decode()
    assert first.startswith(b"data: ")
    assert rest.rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"length"' in rest.replace(" ", "")
    assert "error" not in rest
    assert server.process.wait(timeout=60) == 0
    with pytest.raises(OSError):
        server.connect().request("GET", "/health/live")


def test_a_killed_server_comes_back_with_everything(
    serve: Callable[..., ServerProcess],
    adapter_folders: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve()
    added = json.loads(
        run(capsys, "adapters", "add", adapter_folders[0], "--name", "a", "--store", tmp_path / "store", "--json")
    )
    before = server.complete("a")["choices"][0]["text"]
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    (listed,) = json.loads(run(capsys, "adapters", "list", "--store", tmp_path / "store", "--json"))
    assert listed["version"] == added["version"]
    assert set(listed) == set(added) - {"created", "warnings"}, "with and without a server the object is the same"
    again = serve("--preload", "a")
    answer = again.complete("a")
    assert answer["choices"][0]["text"] == before
    assert answer["system_fingerprint"] == added["version"]


def test_without_a_server_the_door_opens_in_this_process(
    adapter_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert "no store here" in refused(capsys, "adapters", "list", "--store", store)
    assert not store.exists()
    out = run(capsys, "adapters", "import", adapter_folders[0].parent, "--store", store, "--json")
    verdicts = [json.loads(line) for line in out.splitlines()]
    assert [(verdict["name"], verdict["outcome"]) for verdict in verdicts] == [("a1", "added"), ("a2", "added")]
    again = run(capsys, "adapters", "import", adapter_folders[0].parent, "--store", store, "--json")
    assert {json.loads(line)["outcome"] for line in again.splitlines()} == {"unchanged"}
    run(capsys, "adapters", "remove", "a1", "--store", store)
    freed = json.loads(run(capsys, "store", "gc", "--store", store, "--json"))
    assert freed["versions"] == [verdicts[0]["version"]]
    assert "1 versions read, 0 damaged" in run(capsys, "store", "verify", "--store", store)
    damaged = next((store / "versions" / verdicts[1]["version"]).glob("*.safetensors"))
    damaged.chmod(0o600)
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(SystemExit) as stopped:
        main(["store", "verify", "--store", str(store)])
    assert stopped.value.code == 1
    assert "1 damaged" in capsys.readouterr().out


def test_a_refused_adapter_tells_every_reason(
    adapter_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapter_folders[0], broken)
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (broken / "adapter.safetensors").unlink()
    error = refused(capsys, "adapters", "add", broken, "--name", "broken", "--store", tmp_path / "store")
    assert "pickle_refused at pytorch_model.bin" in error
