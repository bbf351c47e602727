"""Launches of the terms of embedding and head. Definitions: ``deltaserve_kernels.vocabulary``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from deltaserve_kernels import row_checks
from deltaserve_kernels.errors import DtypeMismatch, ShapeMismatch
from deltaserve_kernels.tables import LoraTables
from deltaserve_kernels.triton_ops import vocabulary_kernels as kernels
from deltaserve_kernels.triton_ops.early import early
from deltaserve_kernels.triton_ops.row_items import listed_rows, row_items
from deltaserve_kernels.triton_ops.vector_rows import BLOCK
from deltaserve_kernels.vocabulary_family import RowsTables
from deltaserve_kernels.worklist import WorkList

# Columns of added tokens that one program hides.
HIDDEN_AT_ONCE = 128
# Programs that share the trained rows of a head for one row of the step.
PROGRAMS = 32


def embedding_rows(
    ids: Tensor, weight: Tensor, work: WorkList, low_rank: LoraTables, trained: RowsTables
) -> tuple[Tensor, Tensor]:
    """(rows [R, width] of ``weight``'s dtype, touched int32 [R]) of the R listed rows of a step with tokens ``ids``
    int64 [T]: see the kernel. ``weight`` [vocab, width], contiguous. Raises a KernelError."""
    if ids.dtype != torch.int64 or ids.shape != (work.num_rows,) or not ids.is_contiguous():
        raise ShapeMismatch(f"ids are {ids.dtype} {list(ids.shape)}; contiguous int64 [{work.num_rows}] is needed")
    if not weight.is_contiguous():
        raise ShapeMismatch(f"the matrix of the embedding has strides {weight.stride()}; make it contiguous")
    for tables in (low_rank, trained):
        if tables.dtype not in (None, weight.dtype):
            raise DtypeMismatch(f"the tables hold {tables.dtype}, the embedding is {weight.dtype}")
    rows, (vocab, width) = listed_rows(work), weight.shape
    out = torch.empty(len(rows), width, dtype=weight.dtype, device=weight.device)
    touched = torch.empty(len(rows), dtype=torch.int32, device=weight.device)
    if len(rows):
        kernels.embedding_rows[(len(rows), triton.cdiv(width, BLOCK))](
            out, touched, weight, ids, rows, row_items(work), work.item_parts, work.part_slot, work.part_scale,
            low_rank.pointers, low_rank.ranks, trained.pointers, trained.counts, low_rank.num_slots,
            VOCAB=vocab, WIDTH=width, BLOCK=BLOCK, num_warps=4, **early(weight.device),
        )  # fmt: skip
    return out, touched


def put_rows(y: Tensor, values: Tensor, touched: Tensor, work: WorkList) -> None:
    """Listed rows of ``y`` [T, width] become those of ``values`` [R, width] that were touched. Raises a KernelError."""
    row_checks.check_rows(y, work, name="y")
    rows, width = listed_rows(work), y.shape[1]
    values = values.view(-1, width)
    if values.shape[0] != len(rows) or touched.shape != (len(rows),):
        raise ShapeMismatch(f"values {list(values.shape)} and touched {list(touched.shape)}; {len(rows)} rows are due")
    if len(rows):
        kernels.put_rows[(len(rows), triton.cdiv(width, BLOCK))](
            y, y.stride(0), values, rows, touched, WIDTH=width, BLOCK=BLOCK, num_warps=4, **early(y.device)
        )


def head_rows(y: Tensor, x: Tensor, work: WorkList, trained: RowsTables) -> None:
    """Trained rows of the head: ``y`` [R, vocab] += what they make of ``x`` [R, width], in place. Raises a
    KernelError."""
    row_checks.check_rows(y, work, name="y")
    row_checks.check_rows(x, work, trained, (1,), x.shape[1])
    if trained.dtype not in (None, x.dtype) or y.dtype != x.dtype:
        raise DtypeMismatch(f"the tables hold {trained.dtype}, x is {x.dtype} and y {y.dtype}; one dtype is needed")
    rows, width = listed_rows(work), x.shape[1]
    if len(rows):
        block = triton.next_power_of_2(width)
        kernels.head_rows[(len(rows), PROGRAMS)](
            y, y.stride(0), x, x.stride(0), rows, row_items(work), work.item_parts, work.part_slot, work.part_scale,
            trained.pointers, trained.counts, trained.num_slots,
            PROGRAMS=PROGRAMS, WIDTH=width, BLOCK=block, num_warps=4, **early(x.device),
        )  # fmt: skip


def hide_added(logits: Tensor, work: WorkList, sizes: Tensor, vocab_size: int) -> None:
    """See ``vocabulary_rows.hide_added``; ``sizes`` int32 [num_slots]: token ids of a slot's adapter, 0: the base's.
    Raises a KernelError."""
    row_checks.check_rows(logits, work, name="logits")
    num_added = logits.shape[1] - vocab_size
    if len(logits) and num_added > 0:
        kernels.hide_added_rows[(len(logits), triton.cdiv(num_added, HIDDEN_AT_ONCE))](
            logits, logits.stride(0), row_items(work), work.item_parts, work.part_slot, work.part_scale, sizes,
            vocab_size, logits.shape[1], BLOCK=HIDDEN_AT_ONCE, num_warps=1, **early(logits.device),
        )  # fmt: skip
