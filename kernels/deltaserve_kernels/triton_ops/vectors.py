"""Vector terms: as the epilogue of the low-rank launches, and in the norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor

from deltaserve_kernels import term_checks
from deltaserve_kernels.checks import Member
from deltaserve_kernels.tables import LoraTables
from deltaserve_kernels.triton_ops import guard, lora, norm_kernels
from deltaserve_kernels.triton_ops.row_items import row_items
from deltaserve_kernels.vector_tables import NormTables, VectorTables
from deltaserve_kernels.worklist import WorkList

# Fewer ranks at a time than without vectors, which take registers too.
FORM = replace(lora.DECODE, b_ranks=8)


def lora_vector_linear(
    y: Tensor,
    x: Tensor,
    work: WorkList,
    tables: LoraTables,
    vectors: VectorTables,
    members: Sequence[Member],
    depth: float,
    form: lora.LoraForm | None = None,
) -> None:
    """``y = y * s + b + low-rank delta`` for rows that have one; see ``terms.lora_vector_linear``.

    The launches of ``lora_linear`` and none more. Raises a KernelError.
    """
    guard.check_linear(y, x, work, tables, members)
    term_checks.check_vectors(vectors, tables, members)
    if form is None:
        form = lora.PREFILL if work.has_prompts else FORM
    lora.lora_linear(y, x, work, tables, members, depth, form, vectors)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, work: WorkList, tables: NormTables, norm: int, depth: float
) -> Tensor:
    """Root-mean-square norm whose gain follows each row's adapters; see ``terms.rms_norm``. Raises a KernelError."""
    term_checks.check_norm(x, weight, work, tables, norm)
    if guard.may_look(x):
        term_checks.check_slots(work, tables.num_slots)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    num_rows, size = x.shape
    if num_rows:
        block = triton.next_power_of_2(size)
        norm_kernels.rms_norm[(num_rows,)](
            out, x, x.stride(0), weight, eps, row_items(work), work.item_parts, work.part_slot, work.part_scale,
            tables.pointers, tables.num_slots, norm, depth,
            SIZE=size, BLOCK=block, num_warps=min(max(block // 1024, 1), 8),
        )  # fmt: skip
    return out
