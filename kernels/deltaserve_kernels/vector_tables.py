"""Tables of vector terms: output scales and biases of linears, gains of norms. fp32 always: they are small, and a scale
near one would lose in 16 bits what the base's own rounding loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.errors import OutOfRange, ShapeMismatch
from deltaserve_kernels.tables import _Tables


class VectorEntry(NamedTuple):
    """fp32 [N] each, or None where the adapter has no such term."""

    scale: Tensor | None = None
    bias: Tensor | None = None


class VectorTables(_Tables):
    """Output scale s and bias b of linears: ``y = (y + D) * s + b``. ``get`` answers (s, b), empty where there is none.

    pointers: int64 [num_linears, 2, num_slots]  addresses of s and b, fp32 [N]; 0 where there is none
    """

    def __init__(self, num_linears: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_linears, num_slots, device)
        self.pointers = torch.zeros(num_linears, 2, num_slots, dtype=torch.int64, device=self.device)

    def set(self, linear: int, slot: int, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Point (linear, slot) at fp32 vectors [N], replacing what was there; at least one of the two.

        Contiguous, 16-byte aligned; the caller must not change them while the entry stands. Raises a KernelError and
        leaves the table as it was.
        """
        self.set_all(slot, ((linear, VectorEntry(scale, bias)),))

    def set_all(self, slot: int, entries: Sequence[tuple[int, VectorEntry]]) -> None:
        """``set`` for the vectors of a whole adapter: as few tensor operations as for one linear."""
        self._check_slot(slot)
        linears = [linear for linear, _ in entries]
        self._check_distinct(linears)
        widths = []
        for linear, entry in entries:
            self._check_linear(linear)
            given = [tensor for tensor in entry if tensor is not None]
            for name, tensor in zip(entry._fields, entry, strict=True):
                if tensor is not None:
                    self._check_tensor(name, tensor, 1, (torch.float32,))
            if not given or len({tensor.numel() for tensor in given}) != 1 or not given[0].numel():
                raise ShapeMismatch(f"linear {linear}: a scale, a bias or both are needed, of one size")
            self._check_dim(linear, 1, given[0].numel())
            widths.append(given[0].numel())
        if not entries:
            return
        none = torch.empty(0, device=self.device)
        kept = [tuple(none if tensor is None else tensor for tensor in entry) for _, entry in entries]
        for linear, tensors in zip(linears, kept, strict=True):
            self._keep(linear, slot, tensors)
        self.dims[linears, 1] = torch.tensor(widths, dtype=torch.int32)
        addresses = [[tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors] for tensors in kept]
        self.pointers[self._upload(linears), :, slot] = self._upload(addresses)

    def _grow_tables(self, extra: int) -> None:
        self.pointers = torch.nn.functional.pad(self.pointers, (0, extra))

    def _clear_tables(self, slot: int) -> None:
        self.pointers[:, :, slot] = 0


class NormTables(_Tables):
    """Differences of norm gains: a row's gain is ``weight + sum over parts of scale * delta``. Norms are numbered.

    pointers: int64 [num_norms, num_slots]  addresses of fp32 [H]; 0 where there is none
    """

    def __init__(self, num_norms: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_norms, num_slots, device)
        self.pointers = torch.zeros(num_norms, num_slots, dtype=torch.int64, device=self.device)

    def set(self, norm: int, slot: int, delta: Tensor) -> None:
        """Point (norm, slot) at a difference of gains, fp32 [H], replacing what was there.

        Contiguous, 16-byte aligned; the caller must not change it while the entry stands. Raises a KernelError and
        leaves the table as it was.
        """
        self.set_all(slot, ((norm, delta),))

    def set_all(self, slot: int, entries: Sequence[tuple[int, Tensor]]) -> None:
        """``set`` for the norms of a whole adapter: as few tensor operations as for one."""
        self._check_slot(slot)
        norms = [norm for norm, _ in entries]
        if len(set(norms)) != len(norms):
            raise OutOfRange("a norm is given twice; a slot has one entry for each")
        for norm, delta in entries:
            if not 0 <= norm < self.num_linears:
                raise OutOfRange(f"norm {norm} is not in 0..{self.num_linears - 1}")
            self._check_tensor("delta", delta, 1, (torch.float32,))
            known = int(self._known[norm, 1])
            if not delta.numel() or (known and known != delta.numel()):
                raise ShapeMismatch(f"norm {norm}: {delta.numel()} gains; earlier entries have {known}")
        if not entries:
            return
        for norm, delta in entries:
            self._keep(norm, slot, (delta,))
        self.dims[norms, 1] = torch.tensor([delta.numel() for _, delta in entries], dtype=torch.int32)
        addresses = [delta.data_ptr() for _, delta in entries]
        self.pointers[self._upload(norms), slot] = self._upload(addresses)

    def _grow_tables(self, extra: int) -> None:
        self.pointers = torch.nn.functional.pad(self.pointers, (0, extra))

    def _clear_tables(self, slot: int) -> None:
        self.pointers[:, slot] = 0
