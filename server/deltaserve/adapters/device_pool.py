"""Adapter slots on the device: which slot holds which version, how many bytes, and the operators' tables.

On a CPU the device's memory is the host's, so staging copies nothing and an adapter is booked in one tier at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve_kernels import LoraTables, SparseEntry, SparseTables


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """The terms of an adapter on the device, by linear index; checked and ready to be pointed at."""

    lora: tuple[tuple[int, Tensor, Tensor], ...]
    sparse: tuple[tuple[int, SparseEntry], ...]


class DevicePool:
    """``num_slots`` slots and ``max_bytes`` bytes. For the engine thread; ``stage`` for any, best for a worker.

    ``linears`` are the base's linears in table order.
    """

    def __init__(
        self,
        linears: Sequence[str],
        lora: LoraTables,
        sparse: SparseTables,
        *,
        num_slots: int,
        max_bytes: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_slots > min(lora.num_slots, sparse.num_slots):
            raise ValueError(f"{num_slots} slots asked for; the tables have {lora.num_slots} and {sparse.num_slots}")
        self.num_slots = num_slots
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.device = torch.device(device)
        self._linear_index = {name: index for index, name in enumerate(linears)}
        self._lora = lora
        self._sparse = sparse
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[int, tuple[str, int]] = {}  # slot -> (version, bytes)
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def shares_host_memory(self) -> bool:
        return self.device.type == "cpu"

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    @property
    def free_bytes(self) -> int:
        return self.max_bytes - self.used_bytes

    def check(self, folded: FoldedAdapter) -> None:
        """Raise ``ValueError`` for a linear that the base does not have. Callable from any thread."""
        for name in folded.terms:
            if name not in self._linear_index:
                raise ValueError(f"the base has no linear {name!r}")

    def stage(self, folded: FoldedAdapter) -> StagedAdapter:
        """Check the terms and bring them to the device; complete when it returns. Reads all of a sparse term and, on
        CUDA, copies. Raises ``ValueError`` for a linear that the base does not have and for terms the tables refuse.
        """
        self.check(folded)
        if self._copy_stream is None:
            return self._stage(folded)
        with torch.cuda.stream(self._copy_stream):
            staged = self._stage(folded)
        self._copy_stream.synchronize()
        return staged

    def _stage(self, folded: FoldedAdapter) -> StagedAdapter:
        lora: list[tuple[int, Tensor, Tensor]] = []
        sparse: list[tuple[int, SparseEntry]] = []
        for name, terms in folded.terms.items():
            index = self._linear_index[name]
            for term in terms:
                if isinstance(term, LowRankTerm):
                    lora.append((index, term.a.to(self.device), term.b_t.to(self.device)))
                else:
                    parts = (part.to(self.device) for part in (term.indptr, term.cols, term.values))
                    sparse.append((index, self._sparse.scan(*parts)))
        return StagedAdapter(tuple(lora), tuple(sparse))

    def reserve(self, version: str, nbytes: int) -> int:
        """Take a free slot and book the bytes. Raises ``ValueError`` without room: evict first."""
        if not self._free or nbytes > self.free_bytes:
            raise ValueError(f"no room for {nbytes} bytes: {len(self._free)} slots, {self.free_bytes} bytes are free")
        slot = self._free.pop()
        self._held[slot] = (version, nbytes)
        self.used_bytes += nbytes
        return slot

    def install(self, slot: int, staged: StagedAdapter) -> None:
        """Point the tables' ``slot`` at the terms. On an error of the tables the slot is left empty, still reserved."""
        try:
            self._lora.set_all(slot, staged.lora)
            self._sparse.set_all(slot, staged.sparse)
        except Exception:
            self._clear(slot)
            raise

    def release(self, slot: int) -> None:
        """Empty a slot and give it back."""
        _, nbytes = self._held.pop(slot)
        self._clear(slot)
        self.used_bytes -= nbytes
        self._free.append(slot)

    def _clear(self, slot: int) -> None:
        self._lora.clear(slot)
        self._sparse.clear(slot)

    def versions(self) -> list[str]:
        """Versions that hold a slot."""
        return [version for version, _ in self._held.values()]

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` when slots or bytes do not add up."""
        slots = sorted([*self._free, *self._held])
        if slots != list(range(self.num_slots)):
            raise RuntimeError(f"device pool: slots free or held are {slots}, not 0..{self.num_slots - 1} once each")
        total = sum(nbytes for _, nbytes in self._held.values())
        if total != self.used_bytes or not 0 <= total <= self.max_bytes:
            raise RuntimeError(f"device pool: {total} bytes held, {self.used_bytes} booked, {self.max_bytes} allowed")
