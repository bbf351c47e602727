"""Whoever stops an admission, and wherever: what is left is the old state or the new one, and nothing else."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltaserve.admission.work_thread import WorkThread
from deltaserve.core import Binding, Logits
from deltaserve.model.base import BaseModel
from deltatest.admission_rig import Rig, open_rig, run
from deltatest.dying_admission import admit_and_die


def cancel_at(step: int, task: asyncio.Task[Any], rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Cancel ``task`` while it waits for its ``step``-th piece of work; returns a cell that counts the pieces."""
    seen = [0]

    def count() -> None:
        if seen[0] == step:
            task.cancel()
        seen[0] += 1

    true_run, true_run_to_end, true_probe = WorkThread.run, WorkThread.run_to_end, rig.engine.probe

    async def counted_run(self: WorkThread, function: Callable[[], Any]) -> Any:
        count()
        return await true_run(self, function)

    async def counted_run_to_end(self: WorkThread, function: Callable[[], Any]) -> Any:
        count()
        return await true_run_to_end(self, function)

    async def counted_probe(ids: tuple[int, ...], binding: Binding) -> Logits:
        count()
        await asyncio.sleep(0)
        return await true_probe(ids, binding)

    monkeypatch.setattr(WorkThread, "run", counted_run)
    monkeypatch.setattr(WorkThread, "run_to_end", counted_run_to_end)
    monkeypatch.setattr(rig.engine, "probe", counted_probe)
    return seen


def test_a_cancelled_admission_leaves_the_old_state_or_the_new_one(
    rig: Rig, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of an upload leaves, at every point of it in turn."""
    old = run(rig.admit(shelf / "lora-0")).record.version
    outcomes: list[str] = []

    async def attempt(step: int) -> bool:
        """Whether the admission came to its end without being cancelled."""
        task = asyncio.ensure_future(rig.admit(shelf / "lora-1"))
        with monkeypatch.context() as patched:
            seen = cancel_at(step, task, rig, patched)
            cancelled = False
            try:
                await task
            except asyncio.CancelledError:
                cancelled = True
            assert cancelled == (seen[0] > step)
        await rig.admission.publish()
        assert rig.is_clean()
        current = rig.store.get("default", "a").version
        assert rig.engine.names.resolve("default", "a").version == current
        assert rig.proven.locate(current) is not None
        outcomes.append("old" if current == old else "new")
        if current != old:
            await rig.admission.rollback("default", "a", old)
        return not cancelled

    async def every_step() -> None:
        for step in range(40):
            if await attempt(step):
                return
        pytest.fail("the admission never came to its end")

    run(every_step())
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert len(outcomes) > 6
    assert outcomes == sorted(outcomes, reverse=True)


def test_a_cancelled_upload_lets_the_next_one_in(rig: Rig, shelf: Path) -> None:
    async def steps() -> None:
        first = asyncio.ensure_future(rig.admit(shelf / "lora-0", "first"))
        second = asyncio.ensure_future(rig.admit(shelf / "lora-1", "second"))
        third = asyncio.ensure_future(rig.admit(shelf / "lora-2", "third"))
        await asyncio.sleep(0.001)
        first.cancel()
        second.cancel()
        assert (await third).created
        await asyncio.gather(first, second, return_exceptions=True)
        assert rig.is_clean()

    run(steps())


STORE_STEPS = (
    "build-made",
    "placed:adapter_config.json",
    "placed:adapter_model.safetensors",
    "manifest-written",
    "build-synced",
    "renamed",
    "rename-synced",
    "rows-written",
    "committed",
)


@pytest.mark.parametrize("where", ["staged", "probe", *STORE_STEPS, "place", "publish"])
def test_a_killed_process_leaves_the_old_state_or_the_new_one(
    base: BaseModel, base_folder: Path, shelf: Path, tmp_path: Path, where: str
) -> None:
    """kill -9 at every step of an upload; then a new process opens the store and serves what it finds."""
    before = open_rig(base, tmp_path / "store")
    old = run(before.admit(shelf / "lora-0")).record.version
    before.close()
    exit_code = admit_and_die(where, base_folder, tmp_path / "store", shelf / "lora-1")
    assert exit_code == -signal.SIGKILL, f"the process reached its end instead of dying at {where!r}"
    after = open_rig(base, tmp_path / "store")
    current = after.store.get("default", "a").version
    assert (current == old) == (where in ("staged", "probe", *STORE_STEPS[:-1]))
    assert after.is_clean()
    run(after.admission.publish())
    run(after.admission.prepare(current))
    assert after.proven.locate(current) is not None
    assert after.store.verify(current) == ()
    assert run(after.admit(shelf / "lora-1")).record.version == after.store.get("default", "a").version
    after.close()
