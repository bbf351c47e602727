"""Adapter slots on the device: which slot holds which version, how many bytes, and the operators' tables.

On a CPU the device's memory is the host's, so staging copies nothing and an adapter is booked in one tier at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from deltaserve.adapters.apart_entries import apart_entries
from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.adapters.vector_entries import vector_entries
from deltaserve.adapters.vocabulary_entries import vocabulary_entries
from deltaserve.deltas.blocks import BlockTerm
from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm, SparseTerm
from deltaserve_kernels import (
    ApartEntries,
    BlockEntry,
    PrefixEntry,
    SparseEntry,
    VectorEntries,
    VocabularyEntries,
)

NO_VECTORS = VectorEntries()
NOTHING_APART = ApartEntries()
NO_VOCABULARY = VocabularyEntries()
Family = TypeVar("Family")


@dataclass(frozen=True, slots=True)
class StagedAdapter:
    """The terms of an adapter by linear index, checked, in the forms that the tables hold: on the host until ``stage``
    brings them over, then ready to be pointed at. Keeps alive no memory but its own."""

    lora: tuple[tuple[int, Tensor, Tensor], ...]
    sparse: tuple[tuple[int, SparseEntry], ...]
    vectors: VectorEntries = NO_VECTORS
    apart: ApartEntries = NOTHING_APART
    vocabulary: VocabularyEntries = NO_VOCABULARY
    blocks: tuple[tuple[int, BlockEntry], ...] = ()
    prefix: PrefixEntry | None = None

    @property
    def nbytes(self) -> int:
        """On the host as on the device."""
        lora, sparse = sum(a.nbytes + b_t.nbytes for _, a, b_t in self.lora), sum(e.nbytes for _, e in self.sparse)
        blocks = sum(entry.nbytes for _, entry in self.blocks)
        prefix = self.prefix.nbytes if self.prefix is not None else 0
        return lora + sparse + self.vectors.nbytes + self.apart.nbytes + self.vocabulary.nbytes + blocks + prefix

    def to(self, device: torch.device) -> StagedAdapter:
        lora = tuple((index, a.to(device), b_t.to(device)) for index, a, b_t in self.lora)
        sparse = tuple((index, entry.to(device)) for index, entry in self.sparse)
        blocks = tuple((index, entry.to(device)) for index, entry in self.blocks)
        vectors, vocabulary = self.vectors.to(device), self.vocabulary.to(device)
        prefix = self.prefix.to(device) if self.prefix is not None else None
        return StagedAdapter(lora, sparse, vectors, self.apart.to(device), vocabulary, blocks, prefix)


class DevicePool:
    """``num_slots`` slots and ``max_bytes`` bytes. For the engine thread; ``convert`` and ``stage`` for any, best for a
    worker.

    Adapters with terms of a family that ``tables`` have not are refused.
    """

    def __init__(
        self,
        tables: DeltaTables,
        *,
        num_slots: int,
        max_bytes: int,
        device: torch.device | str = "cpu",
    ) -> None:
        available = [family.num_slots for family in tables.served()]
        if num_slots > min(available, default=0):
            raise ValueError(f"{num_slots} slots asked for; the tables have {', '.join(map(str, available))}")
        self.num_slots = num_slots
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.device = torch.device(device)
        self._tables = tables
        self._linear_index = {name: index for index, name in enumerate(tables.linears)}
        self._norm_index = {name: index for index, name in enumerate(tables.norms)}
        self._point_index = {name: index for index, name in enumerate(tables.points)}
        self._matrix_index = {name: index for index, name in enumerate(tables.matrices) if name is not None}
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

    def convert(self, folded: FoldedAdapter) -> StagedAdapter:
        """Check the terms and bring them into the forms that the tables hold, on the host. Reads all of a sparse term.
        Raises ``ValueError`` for a linear that the base does not have and for sparse terms that the tables refuse.
        """
        lora: list[tuple[int, Tensor, Tensor]] = []
        sparse: list[tuple[int, SparseEntry]] = []
        blocks: list[tuple[int, BlockEntry]] = []
        tables = self._tables
        # A file's tensors share one buffer: whatever stays of it would keep the CSR arrays that nobody reads.
        is_apart = tables.sparse is not None and not tables.sparse.has_csr and "sparse" in folded.kinds
        for name, terms in folded.terms.items():
            if name in self._matrix_index:
                continue
            index = self._linear_index.get(name)
            if index is None:
                raise ValueError(f"the base has no linear {name!r}")
            for term in terms:
                if isinstance(term, LowRankTerm):
                    _served(tables.lora, "low-rank terms")
                    a, b_t = (term.a.clone(), term.b_t.clone()) if is_apart else (term.a, term.b_t)
                    lora.append((index, a, b_t))
                elif isinstance(term, SparseTerm):
                    scan = _served(tables.sparse, "sparse terms").scan
                    sparse.append((index, scan(term.indptr, term.cols, term.values)))
                elif isinstance(term, BlockTerm):
                    blocks.append((index, self._scan_block(term, is_apart)))
        matrices = self._matrix_index
        vectors = vector_entries(
            folded,
            self._linear_index,
            self._norm_index,
            others=matrices,
            is_apart=is_apart,
            is_wide=not self.shares_host_memory,  # a GPU's tables hold fp32
        )
        if vectors.nbytes:
            _served(tables.vectors, "vector terms")
        terms_apart = apart_entries(folded, self._linear_index, self._point_index, is_apart=is_apart)
        if terms_apart.nbytes:
            _served(tables.apart, "dense differences and residual modules")
        vocabulary = vocabulary_entries(folded, matrices, is_apart=is_apart)
        if vocabulary.nbytes:
            _served(tables.vocabulary, "terms of embedding and head")
        prefix = None
        if folded.prefix is not None:
            _served(tables.prefixes, "prefixes")
            prefix = PrefixEntry(folded.prefix.pages, folded.prefix.num_tokens, folded.prefix.embeddings)
        return StagedAdapter(tuple(lora), tuple(sparse), vectors, terms_apart, vocabulary, tuple(blocks), prefix)

    def _scan_block(self, term: BlockTerm, is_apart: bool) -> BlockEntry:
        blocks = _served(self._tables.blocks, "row and column blocks")
        kept = {role: tensor.clone() if is_apart else tensor for role, tensor in term.tensors().items()}
        return blocks.scan(
            kept["block"],
            term.in_features,
            term.out_features,
            out_rows=kept.get("out_rows"),
            in_cols=kept.get("in_cols"),
        )

    def stage(self, converted: StagedAdapter) -> StagedAdapter:
        """Bring the terms to the device; complete when it returns."""
        if self._copy_stream is None:
            return converted.to(self.device)
        with torch.cuda.stream(self._copy_stream):
            staged = converted.to(self.device)
        self._copy_stream.synchronize()
        return staged

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
        tables = self._tables
        try:
            if tables.lora is not None:
                tables.lora.set_all(slot, staged.lora)
            if tables.sparse is not None:
                tables.sparse.set_all(slot, staged.sparse)
            if tables.vectors is not None:
                tables.vectors.set_all(slot, staged.vectors)
            if tables.apart is not None:
                tables.apart.set_all(slot, staged.apart)
            if tables.vocabulary is not None:
                tables.vocabulary.set_all(slot, staged.vocabulary)
            if tables.blocks is not None:
                tables.blocks.set_all(slot, staged.blocks)
            if tables.prefixes is not None and staged.prefix is not None:
                tables.prefixes.set(slot, staged.prefix)
        except Exception:
            tables.clear(slot)
            raise

    def release(self, slot: int) -> None:
        """Empty a slot and give it back."""
        _, nbytes = self._held.pop(slot)
        self._tables.clear(slot)
        self.used_bytes -= nbytes
        self._free.append(slot)

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


def _served(tables: Family | None, noun: str) -> Family:
    if tables is None:
        raise ValueError(f"this pool has no tables for {noun}")
    return tables
