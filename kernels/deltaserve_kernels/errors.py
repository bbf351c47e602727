"""What the operators and tables refuse, as types. Every message says what was found and what is allowed."""

from __future__ import annotations


class KernelError(ValueError):
    """Base of all refusals of arguments."""


class ShapeMismatch(KernelError):
    """A tensor has the wrong number of dimensions or a size that does not fit its partners."""


class DtypeMismatch(KernelError):
    """A tensor has a dtype that is not allowed here or that differs from its partners'."""


class DeviceMismatch(KernelError):
    """A tensor lives on another device than its partners."""


class NotContiguous(KernelError):
    """A tensor must be contiguous (or contiguous in its last dimension) and is not."""


class Misaligned(KernelError):
    """The first element does not sit on a 16-byte border, so that kernels could not load it wide."""


class OutOfRange(KernelError):
    """An index (row, slot, linear, column, block, position) points outside what it indexes."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""
