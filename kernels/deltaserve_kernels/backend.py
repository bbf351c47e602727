"""Which implementation runs the operators. ``auto`` takes the fastest one that works on the tensors' device."""

from __future__ import annotations

from types import ModuleType

import torch

from deltaserve_kernels.errors import BackendUnavailable

BACKENDS = ("auto", "reference", "cpu", "triton")
_default = "auto"


def use_backend(name: str) -> str:
    """Set the process-wide default of the operators' ``backend`` argument; returns the previous one.

    Raises BackendUnavailable for an unknown name, and for ``cpu`` where the C++ library cannot be built or loaded.
    ``triton`` is judged when an operator meets a device.
    """
    global _default
    _check_name(name)
    if name == "cpu":
        _require_cpu()
    previous, _default = _default, name
    return previous


def select(device: torch.device | str, backend: str | None = None) -> str:
    """``reference``, ``cpu`` or ``triton``: what an operator on this device will run, given its ``backend`` argument.

    May build the C++ library (minutes, once per machine). ``auto`` takes the C++ operators on a CPU, those in
    Triton on CUDA, and falls back to the PyTorch definition where they do not run, on a CPU with one logged notice;
    ``cpu`` and ``triton`` by name raise BackendUnavailable instead.
    """
    name = _default if backend is None else backend
    if name == "reference":
        return name
    _check_name(name)
    device = torch.device(device)
    is_cpu = device.type == "cpu"
    if name == "triton":
        _require_triton(device)
        return name
    if name == "cpu":
        if not is_cpu:
            raise BackendUnavailable(f"backend 'cpu' cannot run on {device}; use 'auto' or 'reference'")
        _require_cpu()
        return name
    if is_cpu:
        from deltaserve_kernels import cpu

        return "cpu" if cpu.is_available() else "reference"
    from deltaserve_kernels import triton_ops

    return "triton" if triton_ops.unavailable_reason(device) is None else "reference"


def implementation(
    device: torch.device, backend: str | None, *, definition: ModuleType, has_cpp: bool = False
) -> ModuleType:
    """The module whose functions run on this device: ``definition`` where PyTorch does, and on a CPU those operators
    that have no C++ twin. Raises BackendUnavailable as ``select``."""
    selected = select(device, backend)
    if selected == "triton":
        from deltaserve_kernels.triton_ops import entry

        return entry
    if selected == "cpu" and has_cpp:
        from deltaserve_kernels import cpu

        return cpu
    return definition


def _require_cpu() -> None:
    from deltaserve_kernels import cpu

    if not cpu.is_available():
        raise BackendUnavailable(f"backend 'cpu' cannot run here: {cpu.unavailable_reason()}")


def _require_triton(device: torch.device) -> None:
    from deltaserve_kernels import triton_ops

    reason = triton_ops.unavailable_reason(device)
    if reason is not None:
        raise BackendUnavailable(f"backend 'triton' cannot run on {device}: {reason}")


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {name!r}; allowed: {', '.join(BACKENDS)}")
