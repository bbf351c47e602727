"""The operators as Triton kernels, for CUDA devices, and on the host in Triton's interpreter (TRITON_INTERPRET=1).

Opt-in: no GPU has run these kernels yet. They are held to the PyTorch definition in the interpreter and compiled ahead
of time (``aot``), so what they cost, and how they behave when programs really run at once, is unknown.

Importing this package does not import triton; ``entry`` does.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, or None if they can."""
    if not _is_installed():
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type == "cuda":
        return "TRITON_INTERPRET=1 is set, which is for tests on the host" if interpreted else None
    if device.type == "cpu":
        return None if interpreted else "on the host only Triton's interpreter runs; it needs TRITON_INTERPRET=1"
    return f"kernels are written for CUDA devices, not {device.type}"


@cache
def _is_installed() -> bool:
    """Asked at every operator; looking through the path takes longer than a launch."""
    return importlib.util.find_spec("triton") is not None
