"""kill -9 and a full disk at every step: the old state or the new one, and a store that goes on working."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from deltaserve_store import staging as staging_module
from deltaserve_store.errors import StoreFull
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.staging import Staging
from deltaserve_store.store import AdapterStore
from deltatest.adapter_corpus import CONFIG, FINGERPRINT, TENSORS, corpus_base, write_good_lora

COMMIT_STEPS = (
    "build-made",
    f"placed:{CONFIG}",
    f"synced:{CONFIG}",
    f"placed:{TENSORS}",
    f"synced:{TENSORS}",
    "manifest-written",
    "build-synced",
    "renamed",
    "rename-synced",
    "rows-written",
    "committed",
)
GC_STEPS = ("gc-rows-deleted", "moved-away")


class Adapters:
    """Two good adapters, parsed once; children of a fork only move files."""

    def __init__(self, root: Path) -> None:
        self.folders = [write_good_lora(root / f"adapter-{seed}", seed=seed) for seed in range(3)]
        self.parsed: list[ParsedAdapter] = [read_adapter(folder, corpus_base()) for folder in self.folders]

    def commit(self, store: AdapterStore, seed: int, name: str = "a") -> str:
        with Staging(store).open() as staged:
            for file in self.folders[seed].iterdir():
                staged.write(file.name, [file.read_bytes()])
            result = store.commit(
                staged.folder,
                self.parsed[seed],
                name=name,
                base_fingerprint=FINGERPRINT,
                evidence={"effect": float(seed)},
            )
        return result.record.version


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("adapters"))


def killed_at(step: str) -> Callable[[str], None]:
    def on_step(reached: str) -> None:
        if reached == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_step


def run_and_die(action: Callable[[], object]) -> None:
    """Runs ``action`` in a forked child, which must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(77)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child ended with {status >> 8} before the step was reached"
    assert os.WTERMSIG(status) == signal.SIGKILL


def assert_sound(store: AdapterStore) -> None:
    """Every version that a name may ask for is whole; nothing unfinished lies about."""
    names = store.snapshot()
    for version in names.versions():
        assert store.verify(version) == ()
    on_disk = {path.name for path in (store.scratch_dir.parent / "versions").iterdir()}
    assert names.versions() <= on_disk
    assert list(store.scratch_dir.iterdir()) == []


def test_steps_are_all_of_them(adapters: Adapters, tmp_path: Path) -> None:
    """A step added to the code must be added here, else it goes untested."""
    steps: list[str] = []
    with AdapterStore.open(tmp_path / "s", on_step=steps.append) as store:
        adapters.commit(store, 0)
        assert tuple(steps) == COMMIT_STEPS
        steps.clear()
        store.delete("default", "a")
        store.gc()
        assert tuple(steps) == GC_STEPS


@pytest.mark.parametrize("step", COMMIT_STEPS)
def test_killed_in_a_commit(step: str, adapters: Adapters, tmp_path: Path) -> None:
    with AdapterStore.open(tmp_path / "s") as store:
        old = adapters.commit(store, 0)
        before = store.snapshot()

    def action() -> None:
        adapters.commit(AdapterStore.open(tmp_path / "s", on_step=killed_at(step)), 1)

    run_and_die(action)
    with AdapterStore.open(tmp_path / "s") as store:
        assert_sound(store)
        record = store.get("default", "a")
        if step == "committed":
            assert (record.effect, len(store.versions("default", "a"))) == (1.0, 2)
        else:
            assert store.snapshot() == before
            assert record.version == old
        new = adapters.commit(store, 1)
        assert store.get("default", "a").version == new
        assert_sound(store)
        store.gc()
        assert list((tmp_path / "s" / "quarantine").iterdir()) == []
    with AdapterStore.open(tmp_path / "s") as store:
        assert store.report == ()


@pytest.mark.parametrize("step", GC_STEPS)
def test_killed_in_gc(step: str, adapters: Adapters, tmp_path: Path) -> None:
    with AdapterStore.open(tmp_path / "s") as store:
        adapters.commit(store, 0)
        kept = adapters.commit(store, 1)
    run_and_die(lambda: AdapterStore.open(tmp_path / "s", on_step=killed_at(step)).gc(keep=1))
    with AdapterStore.open(tmp_path / "s") as store:
        assert_sound(store)
        assert [record.version for record in store.versions("default", "a")] == [kept]
        store.gc(keep=1)
        assert [path.name for path in (tmp_path / "s" / "versions").iterdir()] == [kept]
        assert list((tmp_path / "s" / "quarantine").iterdir()) == []


def test_killed_in_the_first_opening(adapters: Adapters, tmp_path: Path) -> None:
    """A store whose making was cut short is made on."""
    (tmp_path / "s" / "versions").mkdir(parents=True)
    (tmp_path / "s" / "store.db").touch()
    with AdapterStore.open(tmp_path / "s") as store:
        adapters.commit(store, 0)


def test_killed_in_an_upload(tmp_path: Path) -> None:
    AdapterStore.open(tmp_path / "s").close()

    def dying() -> object:
        yield b"x" * 1000
        os.kill(os.getpid(), signal.SIGKILL)

    def action() -> None:
        Staging(AdapterStore.open(tmp_path / "s")).open().write(TENSORS, dying())  # type: ignore[arg-type]

    run_and_die(action)
    assert list((tmp_path / "s" / "staging").iterdir()) != []
    with AdapterStore.open(tmp_path / "s") as store:
        assert store.report == ("swept 1 unfinished uploads",)
        assert_sound(store)


def test_a_kill_gives_the_lock_back(tmp_path: Path) -> None:
    def action() -> None:
        AdapterStore.open(tmp_path / "s", url="http://127.0.0.1:1")
        os.kill(os.getpid(), signal.SIGKILL)

    run_and_die(action)
    AdapterStore.open(tmp_path / "s").close()


# a full disk


def no_space(*args: object, **kwargs: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def assert_full_then_fine(store: AdapterStore, adapters: Adapters, spoil: Callable[[], Callable[[], None]]) -> None:
    """A commit while ``spoil`` holds changes nothing and says 507; without it the same commit goes through."""
    old = adapters.commit(store, 0)
    before = store.snapshot()
    mend = spoil()
    with pytest.raises(StoreFull) as raised:
        adapters.commit(store, 1)
    assert raised.value.status == 507
    assert store.snapshot() == before
    assert store.get("default", "a").version == old
    mend()
    assert_sound(store)
    assert [path.name for path in (store.scratch_dir.parent / "versions").iterdir()] == [old]
    new = adapters.commit(store, 1)
    assert store.get("default", "a").version == new != old
    assert_sound(store)


@pytest.mark.parametrize("step", [step for step in COMMIT_STEPS if step != "committed"])
def test_full_at_every_step(step: str, adapters: Adapters, tmp_path: Path) -> None:
    full_at: list[str] = []

    def on_step(reached: str) -> None:
        if reached in full_at:
            no_space()

    def spoil() -> Callable[[], None]:
        full_at.append(step)
        return full_at.clear

    with AdapterStore.open(tmp_path / "s", on_step=on_step) as store:
        assert_full_then_fine(store, adapters, spoil)


@pytest.mark.parametrize("function", ["fsync", "link", "rename"])
def test_full_in_a_system_call(
    function: str, adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil() -> Callable[[], None]:
        monkeypatch.setattr(os, function, no_space)
        return monkeypatch.undo

    with AdapterStore.open(tmp_path / "s") as store:
        assert_full_then_fine(store, adapters, spoil)


def test_full_in_sqlite(adapters: Adapters, tmp_path: Path) -> None:
    """SQLite's own word for it: the database may grow no further."""
    with AdapterStore.open(tmp_path / "s") as store:
        adapters.commit(store, 0)
        connection = store._database._connection
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        version = store.get("default", "a").version
        with pytest.raises(StoreFull):
            store.put_evidence(version, "key", {"text": "x" * 200_000})
        assert store.get("default", "a").version == version
        connection.execute("PRAGMA max_page_count = 100000")
        store.put_evidence(version, "key", {"x": 1})
        assert store.get_evidence(version, "key") == {"x": 1}


def test_full_while_an_upload_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``/dev/full`` is a disk without room."""
    real_open = os.open
    with AdapterStore.open(tmp_path / "s") as store:
        with Staging(store).open() as staged:
            monkeypatch.setattr(staging_module.os, "open", lambda *args, **kwargs: real_open("/dev/full", os.O_WRONLY))
            with pytest.raises(StoreFull) as raised:
                staged.write(TENSORS, [b"x" * 100])
            monkeypatch.undo()
        assert raised.value.status == 507
        assert_sound(store)
        monkeypatch.setattr(os, "mkdir", no_space)
        with pytest.raises(StoreFull):
            Staging(store).open()
        monkeypatch.undo()
        Staging(store).open().discard()


def test_other_errors_are_not_called_full(adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    with AdapterStore.open(tmp_path / "s") as store:
        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="Input/output error"):
            adapters.commit(store, 0)
        monkeypatch.undo()
        assert_sound(store)


# power loss


def test_everything_is_synced_before_it_counts(
    adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, then their folder, then the rename, then the folder of folders, then the rows: an order in which a power
    cut can only lose what was not acknowledged.
    """
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        real_rename(source, target)

    def on_step(step: str) -> None:
        if step in ("build-made", "rows-written"):
            events.append(step)

    with AdapterStore.open(tmp_path / "s", on_step=on_step) as store:
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "rename", rename)
        adapters.commit(store, 0)
        monkeypatch.undo()
        synchronous = store._database._connection.execute("PRAGMA synchronous").fetchone()[0]
        journal = store._database._connection.execute("PRAGMA journal_mode").fetchone()[0]
    assert (synchronous, journal) == (2, "wal")
    build = events[4].removeprefix("sync ")
    assert build.startswith("version-")
    expected = ["build-made", f"sync {CONFIG}", f"sync {TENSORS}", "sync manifest.json", f"sync {build}"]
    assert events == [*expected, "rename", "sync versions", "rows-written"]
