"""What ``deltaserve serve`` tells OpenMP must arrive before the library reads it, and must not override the user."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from deltaserve.openmp import SPINS

SERVE = """
import sys, types
fake = types.ModuleType("deltaserve.cli.server_process")
def run_server(config):
    import torch
    return 0
fake.run_server = run_server
sys.modules[fake.__name__] = fake
from deltaserve.cli import main
main(["serve"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what PyTorch brings on Linux")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, str(SPINS)), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_the_library_hears_how_long_to_spin(given: dict[str, str], spins: str) -> None:
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run(
        [sys.executable, "-c", SERVE],
        env={**kept, **given, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    told = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", found.stderr)
    assert told == [spins] * len(told), found.stderr
    assert told
