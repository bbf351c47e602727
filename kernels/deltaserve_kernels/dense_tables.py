"""Tables of dense differences of weights: full matrices, or one bit a weight with a scale for each output row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.errors import ShapeMismatch
from deltaserve_kernels.pointer_tables import FLOAT_DTYPES, PointerTables

WORD_BITS = 32


class DenseEntry(NamedTuple):
    """A difference Q [N, K] of a linear's weight, in one of two forms.

    full:   ``delta`` [N, K] of a float dtype
    packed: ``signs`` int32 [N, ceil(K / 32)], column k is bit k % 32 of word k // 32, set where the sign is +;
            ``scale`` fp32 [N], what the signs of a row are multiplied by
    """

    in_features: int
    delta: Tensor | None = None
    signs: Tensor | None = None
    scale: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.delta, self.signs, self.scale) if t is not None]

    @property
    def out_features(self) -> int:
        return self.tensors()[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device) -> DenseEntry:
        moved = [None if t is None else t.to(device) for t in (self.delta, self.signs, self.scale)]
        return DenseEntry(self.in_features, *moved)

    def rows(self, i: int, j: int) -> Tensor:
        """fp32 [j - i, K]: rows i..j of Q, made anew unless they are kept as fp32."""
        if self.delta is not None:
            return self.delta[i:j].float()
        if self.signs is None or self.scale is None:
            raise ShapeMismatch("the entry holds neither a matrix nor signs with scales")
        return unpack_bits(self.signs[i:j], self.in_features).float().mul_(2).sub_(1).mul_(self.scale[i:j, None])


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """int32 [N, ceil(count / 32)] -> uint8 [N, count] of 0 and 1; bit 0 of a word comes first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    octets = words.contiguous().view(torch.uint8)  # little-endian: the low bits of a word come first
    return ((octets[..., None] >> shifts) & 1).flatten(1)[:, :count]


def pack_bits(bits: Tensor) -> Tensor:
    """bool [N, K] -> int32 [N, ceil(K / 32)]: the inverse of ``unpack_bits``."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % WORD_BITS))
    weights = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=bits.device)
    octets = (padded.view(len(bits), -1, 8) * weights).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


class DenseTables(PointerTables):
    """Dense differences by (linear, slot).

    pointers:     int64 [num_linears, 2, num_slots]  addresses of a matrix and 0, or of signs and their scale
    matrix_dtype: that of all full matrices, None before the first
    """

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_linears, num_slots, device)
        self.pointers = self._array(2)
        self.matrix_dtype: torch.dtype | None = None
        self._entries: dict[tuple[int, int], DenseEntry] = {}

    def entry(self, linear: int, slot: int) -> DenseEntry | None:
        return self._entries.get((linear, slot))

    def set_all(self, slot: int, entries: Sequence[tuple[int, DenseEntry]]) -> None:
        """Put the differences of a whole adapter into a slot. Raises a KernelError and leaves the table as it was."""
        linears = [linear for linear, _ in entries]
        self._check_places(slot, linears)
        held = self.matrix_dtype
        for linear, entry in entries:
            held = self._check_entry(linear, entry, held)
        if not entries:
            return
        tensors = [entry.tensors() for _, entry in entries]
        sizes = [(entry.in_features, entry.out_features) for _, entry in entries]
        pointers = [(of_entry[0].data_ptr(), *(t.data_ptr() for t in of_entry[1:]), 0)[:2] for of_entry in tensors]
        self._put(slot, linears, [tuple(of_entry) for of_entry in tensors], sizes, pointers=pointers)
        self.matrix_dtype = held
        self._entries |= {(linear, slot): entry for linear, entry in entries}

    def _check_entry(self, linear: int, entry: DenseEntry, held: torch.dtype | None) -> torch.dtype | None:
        """Raises a KernelError; the dtype of matrices with this entry beside those of ``held``."""
        width = entry.in_features
        if entry.delta is not None and entry.signs is None and entry.scale is None:
            self._check_tensor("delta", entry.delta, 2, FLOAT_DTYPES)
            self._check_value_dtype("delta", entry.delta.dtype, held)
            held = entry.delta.dtype
            is_fitting = entry.delta.shape[1] == width
        elif entry.delta is None and entry.signs is not None and entry.scale is not None:
            self._check_tensor("signs", entry.signs, 2, (torch.int32,))
            self._check_tensor("scale", entry.scale, 1, (torch.float32,))
            num_words = -(-width // WORD_BITS)
            is_fitting = entry.signs.shape == (entry.scale.numel(), num_words)
        else:
            raise ShapeMismatch(f"linear {linear}: either a matrix or signs with scales must be given")
        if not is_fitting or not width or not entry.out_features:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in entry.tensors())
            raise ShapeMismatch(f"linear {linear}: {shapes} do not hold a matrix of {width} columns")
        self._check_dim(linear, 0, width)
        self._check_dim(linear, 1, entry.out_features)
        return held

    def _forget(self, linear: int, slot: int) -> None:
        self._entries.pop((linear, slot), None)
