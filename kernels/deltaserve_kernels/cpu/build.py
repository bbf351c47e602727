"""Builds the C++ library with direct compiler calls and keeps it in the user's cache folder.

One call for each unit, as many side by side as there are cores, and one that links them.

The file name carries a hash of the sources, the flags, torch's version and the architecture. Instruction sets are
chosen at run time, so that a library built in an image works on every machine of that architecture. Several processes
may start at once: one builds under a file lock, the others wait and use its result.

``python -m deltaserve_kernels.cpu`` builds ahead of time and prints the path.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
# Translation units, those that take longest first, so that none of them is left over at the end.
UNITS = (
    "kernels_portable.cpp",
    "ops.cpp",
    "kernels_avx512.cpp",
    "kernels_avx2.cpp",
    "kernels_avx512_bf16.cpp",
)
SOURCES = (
    *UNITS,
    "tables.inc",
    "elements.inc",
    "given.inc",
    "levels.inc",
    "tasks.inc",
    "pool.inc",
    "work.inc",
    "linear.inc",
    "paged_attention.inc",
    "pointwise_ops.inc",
    "packed_inputs.inc",
    "packed_linear.inc",
    "changes.inc",
    "changes_ops.inc",
    "vector_ops.inc",
    "packed_terms.inc",
    "block_ops.inc",
    "apart_ops.inc",
    "vocabulary_ops.inc",
    "rotation_ops.inc",
    "kernels.inc",
    "vec.inc",
    "vec_avx512.inc",
    "vec_avx2.inc",
    "vec_portable.inc",
    "lanes.inc",
    "lora.inc",
    "sparse.inc",
    "attention.inc",
    "pointwise.inc",
    "gemm.inc",
    "apart.inc",
    "mask.inc",
    "rotation.inc",
)
COMPILERS = ("g++", "c++", "clang++")
# Contraction is off because portable code must round the same in its row and its tile form; intrinsics fuse by name.
FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-Wno-psabi",
)
LINK_FLAGS = ("-shared", "-fopenmp", "-ltorch_cpu", "-lc10")
TIMEOUT_SECONDS = 600  # of each compiler
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # Linux's control group of a container, version 2


class BuildFailed(RuntimeError):
    """No library: the message says why and what to do."""


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/deltaserve``, else ``~/.cache/deltaserve``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "deltaserve"


def library_path() -> Path:
    """Where the library of these sources lies once built."""
    key = hashlib.sha256()
    for part in (*FLAGS, *LINK_FLAGS, torch.__version__, platform.machine(), sys.platform):
        key.update(part.encode() + b"\0")
    for name in SOURCES:
        key.update((SOURCE_FOLDER / name).read_bytes())
    return cache_folder() / f"kernels_cpu-{key.hexdigest()[:16]}.so"


def ensure_built() -> Path:
    """Path of a whole library, building it where there is none. Raises BuildFailed."""
    path = library_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(path.parent)
        if is_whole(path):
            return path
        with _locked(path.with_suffix(".lock")):
            if not is_whole(path):
                _build(path)
    except OSError as error:
        raise BuildFailed(f"cannot write to the cache folder {path.parent}: {error}") from error
    return path


def _check_owner(folder: Path) -> None:
    """What lies here is loaded as code, so nobody else may be able to put it here."""
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o002:
        raise BuildFailed(
            f"the cache folder {folder} belongs to user {status.st_uid} with mode {status.st_mode & 0o777:o}; "
            "it must be yours (or root's) and not writable by everybody; set XDG_CACHE_HOME to another folder"
        )


def is_whole(path: Path) -> bool:
    """True when the library is there and its bytes are the ones that were built."""
    try:
        wanted = _digest_path(path).read_text(encoding="ascii").strip()
        return hashlib.sha256(path.read_bytes()).hexdigest() == wanted
    except (OSError, ValueError):
        return False


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildFailed(
            f"no C++ compiler on PATH (looked for {', '.join(COMPILERS)}); install one, e.g. g++ 11 or newer"
        )
    from torch.utils.cpp_extension import include_paths, library_paths

    jobs = min(_cores(), len(UNITS))
    logger.info(
        "building the CPU operators with %s, %d at once (once per machine, some two minutes of one core in all)",
        compiler,
        jobs,
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        compile_unit = [compiler, *FLAGS, *(f"-I{headers}" for headers in include_paths()), "-c"]
        objects = {unit: f"{folder}/{Path(unit).stem}.o" for unit in UNITS}
        _run_all([[*compile_unit, str(SOURCE_FOLDER / unit), "-o", objects[unit]] for unit in UNITS], jobs)
        built = Path(folder) / path.name
        libraries = [f"-L{libraries}" for libraries in library_paths()]
        _run([compiler, *objects.values(), "-o", str(built), *libraries, *LINK_FLAGS])
        # The digest goes first: a library without its digest counts as broken and is built again, never loaded.
        digest = Path(folder) / "digest"
        digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest(), encoding="ascii")
        digest.replace(_digest_path(path))
        built.replace(path)
    logger.info("built %s in %.0f s", path, time.monotonic() - started)


def _cores() -> int:
    """How many processors this process may use, or what a container's share of their time comes to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, int(share) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or no limit: "max 100000"
        return cores


def _run_all(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """Run compilers, ``jobs`` at once. Raises BuildFailed if one fails; after that none is begun."""
    failed = threading.Event()

    def run(command: Sequence[str]) -> None:
        if failed.is_set():
            return
        try:
            _run(command)
        except BuildFailed:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))


def _run(command: Sequence[str]) -> None:
    """Run a compiler. Raises BuildFailed with what it said."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{command[0]} did not finish: {error}") from error
    if result.returncode:
        raise BuildFailed(f"{command[0]} failed with code {result.returncode}:\n{result.stderr[-4000:]}")
