"""Runs the ``*_cases.py`` files beside this one in processes of their own, under Triton's interpreter.

The interpreter is chosen when triton is imported, for the whole process: set here it would reach every other test.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

CASES = sorted(Path(__file__).parent.glob("*_cases.py"))


def no_interpreter() -> str:
    """Why there is no working interpreter, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, and the host needs its interpreter"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton before 3.7 fails on every loop with a loaded bound from numpy 2.4 on"
    return ""


@pytest.mark.skipif(bool(no_interpreter()), reason=no_interpreter() or "never")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    root = Path(__file__).parents[3]
    run = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=480)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert " skipped" not in run.stdout


def test_each_operator_has_cases() -> None:
    names = ["attention", "block", "dense", "fuse", "graph", "lora", "mask", "module", "pointwise", "rotary"]
    names += ["rotation", "sparse", "vector", "vector_rows", "vocabulary"]
    assert [path.stem for path in CASES] == [f"{name}_cases" for name in names]
