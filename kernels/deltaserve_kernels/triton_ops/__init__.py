"""The operators as Triton kernels, for CUDA devices, and on the host in Triton's interpreter (TRITON_INTERPRET=1).

They are held to the PyTorch definition in the interpreter, compiled ahead of time for two architectures (``aot``), and
tested and timed on a GPU of capability 9.0 by ``make gpu``.

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
        if interpreted:
            return "TRITON_INTERPRET=1 is set, which is for tests on the host"
        return None if has_bfloat16(device) else "kernels need a GPU of compute capability 8.0"
    if device.type == "cpu":
        return None if interpreted else "on the host only Triton's interpreter runs; it needs TRITON_INTERPRET=1"
    return f"kernels are written for CUDA devices, not {device.type}"


@cache
def has_bfloat16(device: torch.device) -> bool:
    """Capability 8.0 on, which tensor cores for bfloat16 need too."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _is_installed() -> bool:
    """Asked at every operator; looking through the path takes longer than a launch."""
    return importlib.util.find_spec("triton") is not None
