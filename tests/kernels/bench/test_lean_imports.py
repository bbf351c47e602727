"""A GPU machine need not have the web stack: what a decode step is made of imports without it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ABSENT = (
    "fastapi", "starlette", "pydantic", "uvicorn", "multipart", "typer", "rich", "prometheus_client", "peft", "openai",
    "accelerate", "matplotlib", "hypothesis", "aiohttp", "jinja2", "anyio", "xdist", "pytest_timeout",
)  # fmt: skip
HIDE = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
def find_what_is_there(cls, name, path=None, target=None):
    return None if name.split(".")[0] in {absent!r} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_what_is_there)
"""
MODULES = [
    "deltaserve.model.base",
    "deltaserve.engine.model_runner",
    "deltaserve.engine.decode_graphs",
    "deltabench.gpu",
    "deltabench.section",
    "deltabench.decode_section",
]


if importlib.util.find_spec("triton"):  # comes with a GPU's torch, and not with a CPU's
    MODULES += ["deltaserve_kernels.triton_ops.entry", "deltabench.vendor"]


def run(code: str) -> subprocess.CompletedProcess[str]:
    folders = [str(ROOT / name) for name in ("server", "kernels", "adapters_store", "trainer", "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(absent=ABSENT) + code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )


@pytest.mark.timeout(400)
def test_decode_steps_and_their_benchmark_import_without_the_web_stack() -> None:
    done = run("import importlib\n" + "".join(f"importlib.import_module({name!r})\n" for name in MODULES))
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_hidden_is_not_found() -> None:
    done = run("import fastapi")
    assert done.returncode != 0
    assert "No module named 'fastapi'" in done.stderr


@pytest.mark.timeout(400)
def test_marked_tests_are_collected_without_the_web_stack(tmp_path) -> None:
    code = f"""
from pathlib import Path
from deltabench import gpu_tests
import os, pytest
folder = Path({str(tmp_path)!r})
(folder / "pytest.ini").write_text(gpu_tests.SETTINGS)
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
os.environ["DELTASERVE_TEST_DEVICE"] = "cpu"
arguments = ["-c", str(folder / "pytest.ini"), "--rootdir={ROOT}", "-m", "gpu", "--collect-only"]
sys.exit(pytest.main([*arguments, *map(str, gpu_tests.files())]))
"""
    done = run(code)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_on_gpu.py" in done.stdout
