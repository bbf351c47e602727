"""An admission in a process of its own that dies by SIGKILL at a named point.

The process comes from a fork server that has imported everything but started nothing. A fork of the test process itself
would inherit locks of threads that do not exist in it (OpenMP's, the test runner's) and could hang for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import torch

from deltaserve.admission import derived
from deltaserve.model.base import load_base
from deltaserve_store.staging import StagedUpload, Staging
from deltatest.admission_rig import open_rig, run

JOIN_SECONDS = 200.0


def admit_and_die(where: str, base_folder: Path, store: Path, adapter: Path) -> int:
    """Run the admission of ``adapter`` as a version of "a" until ``where``; returns the process's exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deltaserve.runtime"])
    process = context.Process(target=_admit, args=(where, base_folder, store, adapter))
    process.start()
    process.join(JOIN_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"the admission neither died at {where!r} nor ended in {JOIN_SECONDS:.0f} s")
    return process.exitcode


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _admit(where: str, base_folder: Path, store: Path, adapter: Path) -> None:
    torch.set_num_threads(1)
    base = load_base(base_folder, dtype=torch.float32, cache_dir=store.parent / "digests")
    rig = open_rig(base, store, on_step=lambda step: _kill() if step == where else None)
    if where == "staged":
        StagedUpload.unpack = lambda *_: _kill()  # type: ignore[method-assign, assignment]
        with Staging(rig.store).open() as staged:
            staged.write("adapter_config.json", [b"{"])
            staged.unpack()
    if where == "probe":
        rig.engine.on_probe = lambda binding, logits: _kill() or logits  # type: ignore[func-returns-value]
    if where == "place":
        derived.ProvenFiles.place = lambda *_: _kill()  # type: ignore[method-assign, assignment]
    if where == "publish":
        rig.engine.publish = lambda _: _kill()  # type: ignore[method-assign]
    run(rig.admit(adapter))
