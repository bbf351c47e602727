"""Tables of dense differences of weights: full matrices, or a bit a weight, a sign or what is taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.errors import ShapeMismatch
from deltaserve_kernels.pointer_tables import FLOAT_DTYPES, PointerTables

WORD_BITS = 32
MASK = 1
"""What stands in a mask's second place of ``DenseTables.pointers``; an address is never 1."""


class DenseEntry(NamedTuple):
    """A difference Q [N, K] of a linear's weight, in one of three forms.

    full:   ``delta`` [N, K] of a float dtype
    packed: ``signs`` int32 [N, ceil(K / 32)], column k is bit k % 32 of word k // 32, set where the sign is +;
            ``scale`` fp32 [N], what the signs of a row are multiplied by
    mask:   ``mask`` int32 [N, ceil(K / 32)] alike, set where the base's weight W is taken out: Q is -W there, else 0
    """

    in_features: int
    delta: Tensor | None = None
    signs: Tensor | None = None
    scale: Tensor | None = None
    mask: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.delta, self.signs, self.scale, self.mask) if t is not None]

    @property
    def out_features(self) -> int:
        return self.tensors()[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device) -> DenseEntry:
        moved = [None if t is None else t.to(device) for t in (self.delta, self.signs, self.scale, self.mask)]
        return DenseEntry(self.in_features, *moved)

    def rows(self, i: int, j: int, base_rows: Callable[[int, int], Tensor] | None = None) -> Tensor:
        """fp32 [j - i, K]: rows i..j of Q, made anew unless they are kept as fp32.

        ``base_rows(i, j)``: those of the base's weight, fp32, which a mask needs. Raises ``ShapeMismatch``.
        """
        if self.delta is not None:
            return self.delta[i:j].float()
        if self.mask is not None:
            if base_rows is None:
                raise ShapeMismatch("a mask takes out weights of the base; give the base's weight")
            return -base_rows(i, j) * unpack_bits(self.mask[i:j], self.in_features)
        if self.signs is None or self.scale is None:
            raise ShapeMismatch("the entry holds neither a matrix nor signs with scales nor a mask")
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

    pointers:     int64 [num_linears, 2, num_slots]  addresses of a matrix and 0, of signs and their scale, or of a mask
                  and ``MASK``
    matrix_dtype: that of all full matrices, None before the first
    """

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_linears, num_slots, device)
        self.pointers = self._array(2)
        self.matrix_dtype: torch.dtype | None = None
        self._entries: dict[tuple[int, int], DenseEntry] = {}
        self._masks: set[tuple[int, int]] = set()

    @property
    def has_masks(self) -> bool:
        """Whether some slot has a mask."""
        return bool(self._masks)

    def has_mask(self, members: Sequence[tuple[int, int, int]], slots: Iterable[int]) -> bool:
        """Whether one of these slots has a mask of one of the linears (linear, start, stop)."""
        if not self._masks:
            return False
        masks, linears = self._masks, [member[0] for member in members]
        return any((linear, slot) in masks for slot in slots for linear in linears)

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
        pointers = [
            (t[0].data_ptr(), MASK if entry.mask is not None else t[1].data_ptr() if len(t) > 1 else 0)
            for t, (_, entry) in zip(tensors, entries, strict=True)
        ]
        self._put(slot, linears, [tuple(of_entry) for of_entry in tensors], sizes, pointers=pointers)
        self.matrix_dtype = held
        self._entries |= {(linear, slot): entry for linear, entry in entries}
        self._masks -= {(linear, slot) for linear in linears}
        self._masks |= {(linear, slot) for linear, entry in entries if entry.mask is not None}

    def _check_entry(self, linear: int, entry: DenseEntry, held: torch.dtype | None) -> torch.dtype | None:
        """Raises a KernelError; the dtype of matrices with this entry beside those of ``held``."""
        width = entry.in_features
        num_words = -(-width // WORD_BITS)
        delta, signs, scale, mask = entry[1:]
        if delta is not None and len(entry.tensors()) == 1:
            self._check_tensor("delta", delta, 2, FLOAT_DTYPES)
            self._check_value_dtype("delta", delta.dtype, held)
            held = delta.dtype
            is_fitting = delta.shape[1] == width
        elif mask is not None and len(entry.tensors()) == 1:
            self._check_tensor("mask", mask, 2, (torch.int32,))
            is_fitting = mask.shape[1] == num_words
        elif signs is not None and scale is not None and len(entry.tensors()) == 2:
            self._check_tensor("signs", signs, 2, (torch.int32,))
            self._check_tensor("scale", scale, 1, (torch.float32,))
            is_fitting = signs.shape == (scale.numel(), num_words)
        else:
            raise ShapeMismatch(f"linear {linear}: a matrix, or signs with scales, or a mask must be given")
        if not is_fitting or not width or not entry.out_features:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in entry.tensors())
            raise ShapeMismatch(f"linear {linear}: {shapes} do not hold a matrix of {width} columns")
        self._check_dim(linear, 0, width)
        self._check_dim(linear, 1, entry.out_features)
        return held

    def _forget(self, linear: int, slot: int) -> None:
        self._entries.pop((linear, slot), None)
        self._masks.discard((linear, slot))
