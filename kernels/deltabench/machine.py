"""What a figure was measured on and with: hardware, versions, the commit. Nothing that names a person or a host."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors")


def processor_name() -> str:
    """The model name Linux tells, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def describe(device: torch.device) -> dict[str, Any]:
    """The machine as JSON. On the host ``gpu`` is None and the L2 size unknown (0)."""
    machine: dict[str, Any] = {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": None,
        "l2_bytes": 0,
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": l2_bytes(device),
            "memory_bytes": found.total_memory,
            "driver": driver(),
        }
    return machine


def l2_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 64 MB where the device does not tell. 0 on the host."""
    if device.type != "cuda":
        return 0
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "L2_cache_size", 0)) or 64 * 10**6


def versions() -> dict[str, str | None]:
    """Python's, the packages', CUDA's; None where a package is absent."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def driver() -> str | None:
    """The GPU driver's version, if nvidia-smi is there to tell it."""
    told = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return told.splitlines()[0].strip() if told else None


def commit() -> str | None:
    """The commit of this checkout, with ``+`` when files differ from it; None outside a repository."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not head:
        return None
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head.strip() + ("+" if changed else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
