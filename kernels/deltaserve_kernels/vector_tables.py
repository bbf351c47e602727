"""Tables of vector terms: output scales and biases of linears, gains of norms.

fp32, since a scale near one would lose in 16 bits what the base's own rounding loses. On a CPU vectors of linears may
be bfloat16 instead, for those that lose nothing by it (zeros and ones, or trained in it): half the bytes to read. Of
scales in bfloat16 ``1 + (s - 1)`` must be s in fp32, so that at strength 1 nobody need compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.errors import DtypeMismatch, ShapeMismatch
from deltaserve_kernels.pointer_tables import PointerTables


class VectorEntry(NamedTuple):
    """[N] each and of one dtype, or None where the adapter has no such term."""

    scale: Tensor | None = None
    bias: Tensor | None = None


class VectorTables(PointerTables):
    """Output scale s and bias b of linears: ``y = (y + D) * s + b``. ``get`` answers (s, b) in fp32, empty where there
    is none.

    pointers: int64 [num_linears, 2, num_slots]  addresses of s and b [N], fp32, or bfloat16 where the number is odd:
    one more than the address; 0 where there is none

    ``takes_narrow``: bfloat16 is allowed, of tables on the host. ``dtype`` says nothing here.
    """

    def __init__(
        self, num_linears: int, num_slots: int, device: torch.device | str = "cpu", *, takes_narrow: bool = False
    ) -> None:
        super().__init__(num_linears, num_slots, device)
        self.pointers = self._array(2)
        self._dtypes = (torch.float32, torch.bfloat16) if takes_narrow and self.is_on_host else (torch.float32,)
        self.has_narrow = False
        """Whether bfloat16 vectors were ever put in: operators that know fp32 alone must refuse such a table."""

    def get(self, linear: int, slot: int) -> tuple[Tensor, ...] | None:
        held = super().get(linear, slot)
        return None if held is None else tuple(tensor.float() for tensor in held)

    def set(self, linear: int, slot: int, scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Point (linear, slot) at vectors [N], replacing what was there; at least one of the two, of one dtype: fp32,
        or bfloat16 where the table takes it.

        Contiguous, 16-byte aligned; the caller must not change them while the entry stands. Raises a KernelError and
        leaves the table as it was.
        """
        self.set_all(slot, ((linear, VectorEntry(scale, bias)),))

    def set_all(self, slot: int, entries: Sequence[tuple[int, VectorEntry]]) -> None:
        """``set`` for the vectors of a whole adapter: as few tensor operations as for one linear."""
        linears = [linear for linear, _ in entries]
        self._check_places(slot, linears)
        widths = []
        for linear, entry in entries:
            given = [tensor for tensor in entry if tensor is not None]
            for name, tensor in zip(entry._fields, entry, strict=True):
                if tensor is not None:
                    self._check_tensor(name, tensor, 1, self._dtypes)
            if not given or len({tensor.numel() for tensor in given}) != 1 or not given[0].numel():
                raise ShapeMismatch(f"linear {linear}: a scale, a bias or both are needed, of one size")
            if given[0].dtype != given[-1].dtype:
                raise DtypeMismatch(
                    f"linear {linear}: scale is {given[0].dtype}, bias {given[1].dtype}; one is allowed"
                )
            self._check_dim(linear, 1, given[0].numel())
            widths.append(given[0].numel())
        if not entries:
            return
        none = torch.empty(0, device=self.device)
        kept = [tuple(none if tensor is None else tensor for tensor in entry) for _, entry in entries]
        addresses = [[_address(tensor) for tensor in tensors] for tensors in kept]
        self.has_narrow |= any(entry[-1].dtype == torch.bfloat16 or entry[0].dtype == torch.bfloat16 for entry in kept)
        self._put(slot, linears, kept, [(0, width) for width in widths], pointers=addresses)


def _address(vector: Tensor) -> int:
    """As ``pointers`` hold it."""
    return vector.data_ptr() + (vector.dtype == torch.bfloat16) if vector.numel() else 0


class NormTables(PointerTables):
    """Differences of norm gains: a row's gain is ``weight + sum over parts of scale * delta``. Norms are numbered.

    pointers: int64 [num_norms, num_slots]  addresses of fp32 [H]; 0 where there is none
    """

    NOUN = "norm"

    def __init__(self, num_norms: int, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(num_norms, num_slots, device)
        self.pointers = self._array()

    def set(self, norm: int, slot: int, delta: Tensor) -> None:
        """Point (norm, slot) at a difference of gains, fp32 [H], replacing what was there.

        Contiguous, 16-byte aligned; the caller must not change it while the entry stands. Raises a KernelError and
        leaves the table as it was.
        """
        self.set_all(slot, ((norm, delta),))

    def set_all(self, slot: int, entries: Sequence[tuple[int, Tensor]]) -> None:
        """``set`` for the norms of a whole adapter: as few tensor operations as for one."""
        norms = [norm for norm, _ in entries]
        self._check_places(slot, norms)
        for norm, delta in entries:
            self._check_tensor("delta", delta, 1, (torch.float32,))
            known = int(self._known[norm, 1])
            if not delta.numel() or (known and known != delta.numel()):
                raise ShapeMismatch(f"norm {norm}: {delta.numel()} gains; earlier entries have {known}")
        if not entries:
            return
        deltas = [delta for _, delta in entries]
        dims = [(0, delta.numel()) for delta in deltas]
        self._put(slot, norms, [(delta,) for delta in deltas], dims, pointers=[delta.data_ptr() for delta in deltas])
