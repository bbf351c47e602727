"""Which implementation runs the operators. ``auto`` takes the fastest one that works on the tensors' device."""

from __future__ import annotations

import torch

from deltaserve_kernels.errors import BackendUnavailable

BACKENDS = ("auto", "reference", "cpu")
_default = "auto"


def use_backend(name: str) -> str:
    """Set the process-wide default of the operators' ``backend`` argument; returns the previous one.

    Raises BackendUnavailable for an unknown name, and for ``cpu`` where the C++ library cannot be built or loaded.
    """
    global _default
    _check_name(name)
    if name == "cpu":
        _require_cpu()
    previous, _default = _default, name
    return previous


def select(device: torch.device | str, backend: str | None = None) -> str:
    """``reference`` or ``cpu``: what an operator on this device will run, given its ``backend`` argument.

    May build the C++ library (tens of seconds, once per machine). ``auto`` falls back to the PyTorch twin with one
    logged notice; ``cpu`` by name raises BackendUnavailable instead.
    """
    name = _default if backend is None else backend
    if name == "reference":
        return name
    _check_name(name)
    is_cpu = (device.type if isinstance(device, torch.device) else torch.device(device).type) == "cpu"
    if name == "cpu":
        if not is_cpu:
            raise BackendUnavailable(f"backend 'cpu' cannot run on {device}; use 'auto' or 'reference'")
        _require_cpu()
        return name
    if is_cpu:
        from deltaserve_kernels import cpu

        if cpu.is_available():
            return "cpu"
    return "reference"


def _require_cpu() -> None:
    from deltaserve_kernels import cpu

    if not cpu.is_available():
        raise BackendUnavailable(f"backend 'cpu' cannot run here: {cpu.unavailable_reason()}")


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {name!r}; allowed: {', '.join(BACKENDS)}")
