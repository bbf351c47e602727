"""The client against the real HTTP surface, the real door and the real engine, on a loopback socket."""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deltaserve.admission.folders import RemoteDoor, adapter_files
from deltaserve.admission.importer import Outcome, import_folders
from deltaserve.api.app import create_app
from deltaserve.api.server import make_server
from deltaserve.config import ServeConfig
from deltaserve.errors import AdapterRefused, Conflict, InvalidRequest, NotFound
from deltaserve.metrics import Metrics
from deltaserve.model.base import BaseModel
from deltaserve.remote import RemoteServer
from deltatest.admission_rig import run
from deltatest.runtime_factory import TinyRuntime, open_runtime
from deltatest.tokenizers import byte_level


@asynccontextmanager
async def serve(base: BaseModel, store: Path) -> AsyncIterator[tuple[TinyRuntime, RemoteServer]]:
    async with open_runtime(base, store) as runtime:
        config = ServeConfig(port=0)
        app = create_app(runtime.engine, runtime.admission, runtime.store, byte_level(), Metrics(), config, None)
        server = make_server(app, config)
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
            assert not task.done()
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield runtime, RemoteServer(f"http://127.0.0.1:{port}", timeout_seconds=30)
        finally:
            server.should_exit = True
            await task


def test_life_of_an_adapter_over_http(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    async def steps() -> None:
        async with serve(base, tmp_path / "store") as (runtime, server):
            call = asyncio.to_thread
            one = await call(server.upload, shelf / "lora-0", "poet")
            assert one["created"]
            assert one["effect"] > 0.1
            again = await call(server.upload, shelf / "lora-0", "poet")
            assert (again["created"], again["version"]) == (False, one["version"])
            with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
                for file in sorted((shelf / "lora-1").iterdir()):
                    archive.add(file, file.name)
            two = await call(lambda: server.upload(tmp_path / "b.tar.gz", "poet", expected_version=one["version"]))
            assert two["version"] != one["version"]
            with pytest.raises(Conflict):
                await call(lambda: server.upload(shelf / "lora-2", "poet", expected_version=one["version"]))
            assert (await call(server.show, "poet"))["version"] == two["version"]
            assert [v["version"] for v in await call(server.versions, "poet")] == [two["version"], one["version"]]
            await call(server.alias, "live", "poet")
            assert runtime.engine.resolve("default", "live").version == two["version"]
            await call(server.rollback, "poet")
            assert runtime.engine.resolve("default", "live").version == one["version"]
            assert [row["id"] for row in await call(lambda: list(server.list(limit=1)))] == ["poet"]
            await call(server.delete, "live")
            await call(server.delete, "poet")
            with pytest.raises(NotFound):
                await call(server.show, "poet")

    run(steps())


def test_refusals_over_http_carry_every_reason(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    async def steps() -> None:
        async with serve(base, tmp_path / "store") as (_, server):
            with pytest.raises(AdapterRefused) as caught:
                await asyncio.to_thread(server.upload, shelf / "other-base", "a")
            assert caught.value.error_code == "base_mismatch"
            assert [reason.where for reason in caught.value.reasons] == ["base_model_name_or_path"]
            with pytest.raises(AdapterRefused) as caught:
                await asyncio.to_thread(server.upload, shelf / "zero", "a")
            assert [reason.code for reason in caught.value.reasons] == ["no_effect"]
            answer = await asyncio.to_thread(lambda: server.upload(shelf / "other-base", "a", accept_base=True))
            assert answer["waivers"] == ["base"]
            with pytest.raises(InvalidRequest):
                await asyncio.to_thread(server.upload, shelf / "lora-0", "not/a name")

    run(steps())


def test_imports_over_http_resume(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    async def steps() -> None:
        async with serve(base, tmp_path / "store") as (_, server):
            door = RemoteDoor(server)
            first = {verdict.name: verdict.outcome async for verdict in import_folders(shelf, door)}
            refused = {name for name, outcome in first.items() if outcome is Outcome.REFUSED}
            assert refused == {"other-base", "zero"}
            assert sum(outcome is Outcome.ADDED for outcome in first.values()) == len(first) - 2 >= 6
            second = [verdict async for verdict in import_folders(shelf, door)]
            assert {v.name for v in second if v.outcome is Outcome.UNCHANGED} == set(first) - refused

    run(steps())


def test_imports_in_this_process_leave_training_leftovers_behind(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    async def steps() -> None:
        tree = tmp_path / "runs" / "one"
        tree.mkdir(parents=True)
        for file in adapter_files(shelf / "lora-0")[0]:
            (tree / file.name).write_bytes(file.read_bytes())
        (tree / "optimizer.pt").write_bytes(b"\x80\x04never opened")
        async with open_runtime(base, tmp_path / "store") as runtime:
            verdicts = [verdict async for verdict in import_folders(tmp_path / "runs", runtime.door())]
            assert [(v.name, v.outcome, v.left_behind) for v in verdicts] == [("one", Outcome.ADDED, ("optimizer.pt",))]
            assert runtime.store.get("default", "one").source == "import"
            again = [verdict async for verdict in import_folders(tmp_path / "runs", runtime.door())]
            assert [verdict.outcome for verdict in again] == [Outcome.UNCHANGED]

    run(steps())
