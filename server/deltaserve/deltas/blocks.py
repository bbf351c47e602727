"""Row and column blocks of a folded adapter: ``y += put_O(D take_I x)`` with a dense D and lists of what it reads and
writes. S2FT (arXiv:2412.06289) needs no permutation of the base for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.deltas.folded_file import FileDamaged
from deltaserve.errors import Reason
from deltaserve_store.block_deltas import BlockDelta
from deltaserve_store.spec import LinearSpec


@dataclass(frozen=True, slots=True)
class BlockTerm:
    """``d`` in the serving dtype: [o, in] with ``out_rows`` alone, [o, c] with both lists, [c, out] (transposed) with
    ``in_cols`` alone. Lists int32, strictly ascending; at most one is None, which means all of the linear's."""

    d: Tensor
    out_rows: Tensor | None
    in_cols: Tensor | None
    in_features: int
    out_features: int

    def tensors(self) -> dict[str, Tensor]:
        """By the roles they have in a folded file."""
        named = {"block": self.d, "out_rows": self.out_rows, "in_cols": self.in_cols}
        return {role: tensor for role, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dense(self) -> Tensor:
        """float32 [out, in]."""
        values = self.d.float().t() if self.out_rows is None else self.d.float()
        return _put(values, self.out_rows, self.in_cols, self.out_features, self.in_features)


def misfit(delta: BlockDelta, linear: LinearSpec) -> Reason | None:
    """Why a block does not fit its linear, if it does not."""
    sizes = []
    for what, listed, size in (
        ("row", delta.out_rows, linear.out_features),
        ("column", delta.in_cols, linear.in_features),
    ):
        sizes.append(size if listed is None else listed.numel())
        if listed is None:
            continue
        if not listed.numel() or int(listed.min()) < 0 or int(listed.max()) >= size:
            return Reason("index_out_of_range", delta.module, f"{what}s {listed.tolist()[:8]}", f"0..{size - 1}")
        if bool((listed.diff() <= 0).any()):
            return Reason("unsorted_index", delta.module, f"{what}s {listed.tolist()[:8]}", "strictly ascending")
    if delta.out_rows is None and delta.in_cols is None:
        return Reason("invalid_value", delta.module, "a block without lists", "a list of rows, of columns or both")
    if tuple(delta.values.shape) != tuple(sizes):
        return Reason("shape_mismatch", delta.module, str(tuple(delta.values.shape)), str(tuple(sizes)))
    return None


def fold_block(delta: BlockDelta, linear: LinearSpec, dtype: torch.dtype) -> BlockTerm:
    """The block must have passed ``misfit``."""
    values = delta.values.float().to(dtype)
    d = (values.t() if delta.out_rows is None else values).contiguous()
    return BlockTerm(d, delta.out_rows, delta.in_cols, linear.in_features, linear.out_features)


def dense_block(delta: BlockDelta, linear: LinearSpec) -> Tensor:
    """float32 [out, in] from the file's tensors."""
    return _put(delta.values.float(), delta.out_rows, delta.in_cols, linear.out_features, linear.in_features)


def _put(
    values: Tensor, out_rows: Tensor | None, in_cols: Tensor | None, out_features: int, in_features: int
) -> Tensor:
    dense = torch.zeros(out_features, in_features)
    rows = torch.arange(out_features) if out_rows is None else out_rows.long()
    cols = torch.arange(in_features) if in_cols is None else in_cols.long()
    dense[rows[:, None], cols[None, :]] = values
    return dense


def take_block(name: str, roles: dict[str, Tensor], known: LinearSpec, dtype: torch.dtype) -> BlockTerm | None:
    """The block among a linear's tensors of a folded file, taken out of ``roles``. Raises ``FileDamaged``."""
    if "block" not in roles:
        return None
    d, out_rows, in_cols = roles.pop("block"), roles.pop("out_rows", None), roles.pop("in_cols", None)
    if any(listed is not None and (listed.dtype != torch.int32 or listed.dim() != 1) for listed in (out_rows, in_cols)):
        raise FileDamaged(f"{name!r} has lists that are no int32 vectors")
    if d.dtype != dtype or d.dim() != 2:
        raise FileDamaged(f"{name!r} has a block {d.dtype} {tuple(d.shape)}")
    found = misfit(BlockDelta(name, out_rows, in_cols, d.t() if out_rows is None else d), known)
    if found is not None:
        raise FileDamaged(f"{name!r} has a block with {found.found}, not {found.allowed}")
    return BlockTerm(d, out_rows, in_cols, known.in_features, known.out_features)
