"""Imports: every folder gets a verdict, refusals do not stop the rest, a second run redoes nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltaserve.admission.folders import Admitted, RemoteDoor, adapter_files
from deltaserve.admission.importer import Outcome, Verdict, find_adapter_folders, import_folders, name_of
from deltaserve.errors import AdapterRefused, EngineFailed, InvalidRequest, NotFound, Reason


class MemoryDoor:
    """Keeps what came through; ``refuse`` maps names to errors."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.sent: list[tuple[str, tuple[str, ...]]] = []
        self.refuse: dict[str, Exception] = {}

    async def current_version(self, name: str) -> str | None:
        return self.versions.get(name)

    async def admit(self, files: Sequence[Path], name: str) -> Admitted:
        from deltaserve_store.digest import content_digest

        self.sent.append((name, tuple(file.name for file in files)))
        if name in self.refuse:
            raise self.refuse[name]
        self.versions[name] = content_digest(files[0].parent)
        return Admitted(self.versions[name], True, 1.5, ("told",))


def folder(path: Path, seed: int = 0, **files: bytes) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": seed + 1}))
    save_file({"x": torch.full((2, 2), float(seed))}, path / "adapter_model.safetensors")
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def run(directory: Path, door: MemoryDoor, prefix: str = "") -> list[Verdict]:
    async def collect() -> list[Verdict]:
        return [replace(verdict, seconds=0.0) async for verdict in import_folders(directory, door, prefix=prefix)]

    return asyncio.run(collect())


def test_every_folder_gets_a_verdict_and_refusals_do_not_stop_the_rest(tmp_path: Path) -> None:
    folder(tmp_path / "a")
    folder(tmp_path / "team" / "b c", 1, optimizer__pt=b"\x80", README__md=b"hi")
    folder(tmp_path / "team" / "b c" / "checkpoint-5", 2)
    folder(tmp_path / "bad", 3)
    (tmp_path / "no adapter").mkdir()
    reason = Reason("non_finite", "x", "NaN", "finite values")
    door = MemoryDoor()
    door.refuse["bad"] = AdapterRefused("refused", reasons=[reason])
    rows = run(tmp_path, door)
    assert [(row.folder, row.name, row.outcome) for row in rows] == [
        ("a", "a", Outcome.ADDED),
        ("bad", "bad", Outcome.REFUSED),
        ("team/b c", "team.b-c", Outcome.ADDED),
    ]
    assert (rows[0].effect, rows[0].warnings, rows[0].version) == (1.5, ("told",), door.versions["a"])
    assert (rows[1].message, rows[1].reasons) == ("refused", (reason,))
    assert rows[2].left_behind == ("README.md", "optimizer.pt")
    assert door.sent[-1] == ("team.b-c", ("adapter_config.json", "adapter_model.safetensors"))


def test_a_second_run_sends_nothing_but_what_changed(tmp_path: Path) -> None:
    for seed in range(3):
        folder(tmp_path / f"a{seed}", seed)
    door = MemoryDoor()
    run(tmp_path, door)
    door.sent.clear()
    save_file({"x": torch.ones(2, 2) * 9}, tmp_path / "a1" / "adapter_model.safetensors")
    rows = run(tmp_path, door)
    assert [row.outcome for row in rows] == [Outcome.UNCHANGED, Outcome.ADDED, Outcome.UNCHANGED]
    assert [name for name, _ in door.sent] == ["a1"]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    for seed in range(4):
        folder(tmp_path / f"a{seed}", seed)
    door = MemoryDoor()
    door.refuse["a2"] = EngineFailed("dead")
    with pytest.raises(EngineFailed):
        run(tmp_path, door)
    assert set(door.versions) == {"a0", "a1"}
    door.refuse.clear()
    assert [row.outcome for row in run(tmp_path, door)] == [Outcome.UNCHANGED] * 2 + [Outcome.ADDED] * 2


def test_names_that_clash_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "x y")
    folder(tmp_path / "x-y", 1)
    folder(tmp_path / ("n" * 70), 2)
    rows = run(tmp_path, MemoryDoor())
    assert [(row.folder[:3], row.outcome) for row in rows] == [
        ("nnn", Outcome.REFUSED),
        ("x y", Outcome.ADDED),
        ("x-y", Outcome.REFUSED),
    ]
    assert "64" in rows[0].message
    assert "'x y'" in rows[2].message


def test_one_folder_and_prefixes(tmp_path: Path) -> None:
    single = folder(tmp_path / "poet")
    assert [row.name for row in run(single, MemoryDoor())] == ["poet"]
    assert [row.name for row in run(tmp_path, MemoryDoor(), prefix="old-")] == ["old-poet"]
    assert name_of(tmp_path / "..hidden" / "ünï", tmp_path) == "hidden.-n-"


def test_links_are_not_followed_and_missing_folders_are_told(tmp_path: Path) -> None:
    real = folder(tmp_path / "elsewhere" / "a")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(real, target_is_directory=True)
    assert list(find_adapter_folders(tmp_path / "tree")) == []
    with pytest.raises(InvalidRequest, match="not a folder"):
        list(find_adapter_folders(tmp_path / "nothing"))


def test_without_safetensors_everything_is_sent_so_that_the_door_can_say_why(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", adapter_model__bin=b"\x80")
    (path / "adapter_model.safetensors").unlink()
    sent, left_behind = adapter_files(path)
    assert [file.name for file in sent] == ["adapter_config.json", "adapter_model.bin"]
    assert left_behind == ()


def test_the_door_of_a_running_server(tmp_path: Path) -> None:
    class Server:
        def show(self, name: str) -> dict:
            if name == "new":
                raise NotFound("no such adapter")
            return {"version": "1" * 64}

        def upload(self, path: Sequence[Path], name: str, **options: bool) -> dict:
            assert options == {"accept_base": True, "accept_no_effect": False}
            return {"version": "2" * 64, "created": True, "effect": 0.5, "warnings": ["w"]}

    door = RemoteDoor(Server(), accept_base=True)
    assert asyncio.run(door.current_version("new")) is None
    assert asyncio.run(door.current_version("old")) == "1" * 64
    assert asyncio.run(door.admit([tmp_path / "f"], "new")) == Admitted("2" * 64, True, 0.5, ("w",))
