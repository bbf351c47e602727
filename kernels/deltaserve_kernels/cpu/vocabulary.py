"""The C++ operators of embedding and head; see ``deltaserve_kernels.vocabulary``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve_kernels.cpu import prepared
from deltaserve_kernels.errors import ShapeMismatch
from deltaserve_kernels.tables import LoraTables
from deltaserve_kernels.worklist import WorkList

if TYPE_CHECKING:
    from deltaserve_kernels.vocabulary_family import RowsTables


def change_rows(y: Tensor, x: Tensor, work: WorkList, rows: RowsTables) -> None:
    """Trained rows of the head, in place: ``y`` [R, vocab], ``x`` [R, width]. Raises ValueError."""
    torch.ops.deltaserve_cpu.change_rows(y, x, prepared(work), rows.pointers, rows.counts, rows.dims)


def changed_embeddings(
    ids: Tensor, weight: Tensor, work: WorkList, lora: LoraTables, rows: RowsTables
) -> tuple[Tensor, Tensor]:
    """Rows of the list whose token has another embedding, int64 [n], and that embedding, fp32 [n, width].

    Raises ValueError.
    """
    if lora.shape_of(0) not in ((0, 0), tuple(weight.shape)):
        raise ShapeMismatch(f"low rank of a matrix {lora.shape_of(0)}; the embedding is {tuple(weight.shape)}")
    found, values = torch.ops.deltaserve_cpu.changed_embeddings(
        ids, weight, prepared(work), lora.pointers[0], lora.ranks[0], rows.pointers, rows.counts, rows.dims
    )
    return found, values
