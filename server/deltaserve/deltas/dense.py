"""Fold differences of whole weights: full matrices, bit masks over the base's weights (mask fine-tuning) and signs with
scales (BitDelta).

A mask that marks few weights is met with the base once, here: what it takes out becomes ``-W`` at the marked places, a
sparse term. Of more, the bits stay, as signs do, one a weight on the device too, and a step reads the base's weights. A
weight that was trained whole is met with the base here too, and becomes its difference, taken in float32 and cast once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltaserve.deltas.folded_file import FileDamaged
from deltaserve.errors import Reason
from deltaserve_kernels import DenseEntry, unpack_bits
from deltaserve_store.dense_deltas import WORD_BITS, DenseDelta, MaskDelta, SignDelta, WholeDelta
from deltaserve_store.parsed import SparseDelta
from deltaserve_store.spec import LinearSpec

if TYPE_CHECKING:
    from deltaserve.deltas.vectors import LinearWeights

LISTED = 16
"""A mask becomes a list of entries while it marks at most one weight in so many. An index of 16 bits would then be as
large as the bits; ours, with their values, are larger, but spare a step the base's weights."""
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class DenseTerm:
    """``y += Q x``: ``delta`` [out, in] in the serving dtype, or ``signs`` int32 [out, ceil(in / 32)] with ``scale``
    fp32 [out], or ``mask`` int32 [out, ceil(in / 32)], as ``deltaserve_kernels.DenseEntry`` has them."""

    in_features: int
    delta: Tensor | None = None
    signs: Tensor | None = None
    scale: Tensor | None = None
    mask: Tensor | None = None

    def matrix(self, base: LinearWeights | None = None) -> Tensor:
        """fp32 [out, in]; a mask needs the base's linear."""
        entry = DenseEntry(self.in_features, self.delta, self.signs, self.scale, self.mask)
        if base is None:
            return entry.rows(0, entry.out_features)
        return entry.rows(0, entry.out_features, lambda i, j: base.rows(i, j).cpu())

    def tensors(self) -> dict[str, Tensor]:
        """By the roles they have in a folded file."""
        named = {"delta": self.delta, "signs": self.signs, "sign_scale": self.scale, "mask": self.mask}
        return {role: tensor for role, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def misfit(delta: DenseDelta | WholeDelta | MaskDelta | SignDelta, linear: LinearSpec) -> Reason | None:
    """What is wrong with the delta's shape, if anything."""
    size, words = (linear.out_features, linear.in_features), -(-linear.in_features // WORD_BITS)
    given: dict[tuple[int, ...], set[tuple[int, ...]]]
    if isinstance(delta, DenseDelta):
        given = {tuple(delta.delta.shape): {size}}
    elif isinstance(delta, WholeDelta):
        given = {tuple(delta.weight.shape): {size}}
    elif isinstance(delta, MaskDelta):
        given = {tuple(delta.mask.shape): {(size[0], words)}}
    else:
        given = {tuple(delta.signs.shape): {(size[0], words)}, tuple(delta.scale.shape): {(size[0],), (1,)}}
    for found, allowed in given.items():
        if found not in allowed:
            return Reason("shape_mismatch", delta.module, str(found), " or ".join(map(str, sorted(allowed))))
    return None


def fold_signs_or_matrix(delta: DenseDelta | SignDelta, linear: LinearSpec, dtype: torch.dtype) -> DenseTerm:
    """The term of a delta that needs no weights."""
    if isinstance(delta, DenseDelta):
        return DenseTerm(linear.in_features, delta=delta.delta.to(dtype).contiguous())
    scale = delta.scale.float().expand(linear.out_features).contiguous()
    return DenseTerm(linear.in_features, signs=delta.signs.contiguous(), scale=scale)


def fold_whole(delta: WholeDelta, linear: LinearSpec, weights: LinearWeights, dtype: torch.dtype) -> DenseTerm:
    """What a weight that stands in place of the base's changes, a few rows at a time."""
    changed = torch.empty(linear.out_features, linear.in_features, dtype=dtype)
    for i in range(0, linear.out_features, ROWS_AT_ONCE):
        j = min(i + ROWS_AT_ONCE, linear.out_features)
        changed[i:j] = delta.weight[i:j].float() - weights.rows(i, j).cpu()
    return DenseTerm(linear.in_features, delta=changed)


def fold_mask(delta: MaskDelta, linear: LinearSpec, weights: LinearWeights) -> SparseDelta | DenseTerm:
    """What a mask takes out of the base's weights: entries of a sparse delta, or the mask itself."""
    marked = unpack_bits(delta.mask, linear.in_features).bool()
    if int(marked.sum()) * LISTED > marked.numel():
        return DenseTerm(linear.in_features, mask=delta.mask.contiguous())
    weight = weights.rows(0, linear.out_features).cpu()
    rows, cols = marked.nonzero(as_tuple=True)
    return SparseDelta(delta.module, rows.int(), cols.int(), -weight[rows, cols])


def take_dense(linear: str, roles: dict[str, Tensor], known: LinearSpec, dtype: torch.dtype) -> DenseTerm | None:
    """The dense term among a linear's tensors of a folded file, taken out of ``roles``. Raises ``FileDamaged``."""
    size, words = (known.out_features, known.in_features), -(-known.in_features // WORD_BITS)
    forms = {
        "delta": (size, dtype),
        "signs": ((size[0], words), torch.int32),
        "sign_scale": ((size[0],), torch.float32),
        "mask": ((size[0], words), torch.int32),
    }
    taken = {role: roles.pop(role) for role in forms if role in roles}
    if not taken:
        return None
    for role, tensor in taken.items():
        if (tuple(tensor.shape), tensor.dtype) != forms[role]:
            raise FileDamaged(f"{linear!r} has a {role} {tensor.dtype} {tuple(tensor.shape)}")
    if set(taken) not in ({"delta"}, {"signs", "sign_scale"}, {"mask"}):
        raise FileDamaged(f"{linear!r} has the unexpected parts {sorted(taken)}")
    return DenseTerm(known.in_features, *(taken.get(role) for role in forms))


def change_of(delta: DenseDelta | WholeDelta | MaskDelta | SignDelta, weight: Tensor) -> Tensor:
    """The oracle: the difference of the weight, fp32 like ``weight`` [out, in], from the file's own tensors."""
    if isinstance(delta, DenseDelta):
        return delta.delta.float()
    if isinstance(delta, WholeDelta):
        return delta.weight.float() - weight
    bits = torch.zeros(weight.shape)
    words = delta.mask if isinstance(delta, MaskDelta) else delta.signs
    for column in range(weight.shape[1]):
        bits[:, column] = (words[:, column // WORD_BITS] >> (column % WORD_BITS)) & 1
    if isinstance(delta, MaskDelta):
        return weight * (1 - bits) - weight
    return torch.where(bits == 1, 1.0, -1.0) * delta.scale.float()[:, None]
