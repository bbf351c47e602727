"""Public operators of further adapter terms. On a CPU ``scale_shift`` and ``block_linear`` have C++ twins; the others
run as their PyTorch definition."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from deltaserve_kernels import term_reference
from deltaserve_kernels.backend import implementation, select
from deltaserve_kernels.block_tables import BlockTables
from deltaserve_kernels.checks import Member
from deltaserve_kernels.tables import LoraTables
from deltaserve_kernels.vector_tables import NormTables, VectorTables
from deltaserve_kernels.worklist import WorkList


def _implementation(device: torch.device, backend: str | None) -> ModuleType:
    return implementation(device, backend, definition=term_reference)


def block_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: BlockTables,
    members: Sequence[Member],
    depth: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """Add row and column blocks in place: ``y[row, start:stop] += sum over parts of scale * put_O(D take_I x[row])``.

    Arguments, precision, order and errors as in ``lora_linear``.
    """
    if work.is_empty or not work.concerns(tables, members):
        return
    if x.device.type == "cpu" and select(x.device, backend) == "cpu":
        from deltaserve_kernels import cpu

        cpu.block_linear(y, x, work, tables, members, depth)
    else:
        _implementation(x.device, backend).block_linear(y, x, work, tables, members, depth)


def lora_vector_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: LoraTables,
    vectors: VectorTables,
    members: Sequence[Member],
    depth: float = 0.0,
    *,
    backend: str | None = None,
) -> None:
    """Low-rank deltas, output scales and biases in place: ``y[row, start:stop] = y * s + b + D``.

    D is the delta of ``lora_linear``, s is ``1 + sum over parts of scale * (s_part - 1)`` and b the sum of
    ``scale * b_part``: ``scale_shift``, then ``lora_linear``, but rounded once. ``vectors`` has the linears and slots
    of ``tables``; either may be empty. Other arguments, precision, order and errors as in ``lora_linear``; on a GPU the
    same launches.
    """
    if not work.is_empty and (work.concerns(tables, members) or work.concerns(vectors, members)):
        _implementation(x.device, backend).lora_vector_linear(y, x, work, tables, vectors, members, depth)


def scale_shift(
    y: Tensor,
    work: WorkList,
    tables: VectorTables,
    members: Sequence[Member],
    depth: float = 0.0,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    unit: float = 1.0,
    backend: str | None = None,
) -> None:
    """Scales and biases in place: ``y[row, start:stop] = y * f + t``, rounded once.

    f is ``1 + sum over parts of scale * (s_part - 1)`` and t the sum of ``scale * b_part``: so scales of several parts
    combine as a sum of differences of weights does. What y holds is scaled whole, the base's bias included. Rows and
    members without an entry stay as they are, to the bit.

    With ``gain`` and ``shift`` (fp32 [N], for one member) f starts from the gain and t from the shift; ``unit`` 0 tells
    that the tables hold differences: ``f = gain + sum of scale * s_part``. y [T, N] as in ``lora_linear``, of any float
    dtype. fp32 sums in binding order. Raises a KernelError.
    """
    if work.is_empty or not work.concerns(tables, members):
        return
    if y.device.type == "cpu" and select(y.device, backend) == "cpu":
        from deltaserve_kernels import cpu

        cpu.scale_shift(y, work, tables, members, depth, gain, shift, unit)
    else:
        _implementation(y.device, backend).scale_shift(y, work, tables, members, depth, gain, shift, unit)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    work: WorkList,
    tables: NormTables,
    norm: int,
    depth: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Root-mean-square norm of each row, with the gain ``weight + sum over parts of scale * delta``: contiguous [T, H].

    x [T, H] with contiguous rows and weight [H] are of one float dtype; ``norm`` numbers the norm in ``tables``. fp32,
    rounded once. Rows without a difference are torch's ``rms_norm``: to the bit in the definition, up to the order of
    the sum of squares in kernels. Raises a KernelError.
    """
    return _implementation(x.device, backend).rms_norm(x, weight, eps, work, tables, norm, depth)


def rotate_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_index: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Rotary embedding of q in place, and of k on its way into the cache, where v goes too; k and v stay as they are.

    q [T, H, D];  k, v [T, kv_heads, D];  caches and ``kv_index`` as in ``write_kv``
    cos, sin  [T, R / 2] of any float dtype, of each row's position; contiguous in the last dimension

    Half-split rotation (Llama's) of the first R of D elements, R the rotary size: element d < R / 2 turns with element
    R / 2 + d, the rest passes. fp32, rounded once. Raises a KernelError.
    """
    _implementation(q.device, backend).rotate_and_write_kv(q, k, v, cos, sin, k_cache, v_cache, kv_index)
