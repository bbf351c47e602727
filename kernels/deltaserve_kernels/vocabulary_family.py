"""Tables of what adapters change of the embedding and of the head: low rank, trained rows, scales and biases.

The two are numbered here as tables number linears. What the terms mean is ``vocabulary``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.errors import OutOfRange, ShapeMismatch
from deltaserve_kernels.pointer_tables import FLOAT_DTYPES, PointerTables
from deltaserve_kernels.tables import LoraTables
from deltaserve_kernels.vector_tables import VectorEntry, VectorTables

EMBEDDING, HEAD = 0, 1


class RowsEntry(NamedTuple):
    """Differences of some rows: token ids int32 [k], strictly ascending, and ``values`` [k, width]."""

    ids: Tensor
    values: Tensor


class RowsTables(PointerTables):
    """Trained rows, by embedding and head. ``get`` answers (ids, values).

    pointers: int64 [2, 2, num_slots]  addresses of ids and values; 0 where there are none
    counts:   int32 [2, num_slots]
    """

    ARRAYS = ("pointers", "counts")
    NOUN = "matrix"

    def __init__(self, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(2, num_slots, device)
        self.pointers = self._array(2)
        self.counts = self._array(dtype=torch.int32)

    def set_all(self, slot: int, entries: Sequence[tuple[int, RowsEntry]]) -> None:
        """Point a slot at an adapter's rows, whose ids ``VocabularyEntries.scanned`` checks. Raises a KernelError and
        leaves the table as it was."""
        held = self.dtype
        self._check_places(slot, [matrix for matrix, _ in entries])
        for matrix, (ids, values) in entries:
            self._check_tensor("ids", ids, 1, (torch.int32,))
            self._check_tensor("values", values, 2, FLOAT_DTYPES)
            self._check_value_dtype("values", values.dtype, held)
            held = values.dtype
            if ids.numel() != values.shape[0] or not values.numel():
                raise ShapeMismatch(f"{ids.numel()} ids and values {list(values.shape)}; a row for each id is needed")
            self._check_dim(matrix, 1, values.shape[1])
        if entries:
            matrices = [matrix for matrix, _ in entries]
            rows = [entry for _, entry in entries]
            self._put(
                slot,
                matrices,
                [tuple(entry) for entry in rows],
                [(0, entry.values.shape[1]) for entry in rows],
                pointers=[(entry.ids.data_ptr(), entry.values.data_ptr()) for entry in rows],
                counts=[entry.ids.numel() for entry in rows],
            )


class VocabularyEntries(NamedTuple):
    """One adapter's terms: (matrix, A [r, in], B transposed [r, out]), (matrix, trained rows) and (matrix, scale and
    bias, fp32 [out] each; the embedding has no bias).

    Of the embedding ``in`` is the vocabulary and ``out`` the width of a row, of the head the other way round.
    ``num_token_ids``: one more than the largest token with a row, once ``scanned`` has looked.
    """

    lora: tuple[tuple[int, Tensor, Tensor], ...] = ()
    rows: tuple[tuple[int, RowsEntry], ...] = ()
    vectors: tuple[tuple[int, VectorEntry], ...] = ()
    num_token_ids: int | None = None

    @property
    def nbytes(self) -> int:
        low_rank = sum(a.nbytes + b_t.nbytes for _, a, b_t in self.lora)
        vectors = sum(tensor.nbytes for _, entry in self.vectors for tensor in entry if tensor is not None)
        return low_rank + vectors + sum(entry.ids.nbytes + entry.values.nbytes for _, entry in self.rows)

    def to(self, device: torch.device) -> VocabularyEntries:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return VocabularyEntries(
            tuple((matrix, a.to(device), b_t.to(device)) for matrix, a, b_t in self.lora),
            tuple((matrix, RowsEntry(*(tensor.to(device) for tensor in entry))) for matrix, entry in self.rows),
            tuple((matrix, VectorEntry(move(entry.scale), move(entry.bias))) for matrix, entry in self.vectors),
            self.num_token_ids,
        )

    def scanned(self) -> VocabularyEntries:
        """The same, its token ids checked: to be done on the host, for on a GPU looking waits. Raises OutOfRange."""
        if self.num_token_ids is not None:
            return self
        largest = -1
        for _, (ids, _) in self.rows:
            if not ids.numel() or int(ids[0]) < 0 or bool((ids.diff() <= 0).any()):
                raise OutOfRange(f"ids {ids.tolist()[:8]} must be strictly ascending, none negative")
            largest = max(largest, int(ids[-1]))
        return self._replace(num_token_ids=largest + 1)


class VocabularyFamily:
    """Three tables over the same slots. For the engine thread, as all tables."""

    def __init__(self, num_slots: int, device: torch.device | str = "cpu") -> None:
        self.lora = LoraTables(2, num_slots, device)
        self.rows = RowsTables(num_slots, device)
        self.vectors = VectorTables(2, num_slots, device)
        self.num_slots = num_slots
        self._num_token_ids: dict[int, int] = {}
        # The same, int32 [num_slots]: what kernels hide foreign tokens by.
        self.sizes = torch.zeros(num_slots, dtype=torch.int32, device=device)

    @property
    def is_empty(self) -> bool:
        return self.lora.is_empty and self.rows.is_empty and self.vectors.is_empty

    def has_slot(self, slot: int) -> bool:
        """True when the slot has a term of the embedding or of the head."""
        return self.lora.has_slot(slot) or self.rows.has_slot(slot) or self.vectors.has_slot(slot)

    def has(self, matrix: int, slot: int) -> bool:
        return any(tables.get(matrix, slot) is not None for tables in (self.lora, self.rows, self.vectors))

    def set_all(self, slot: int, entries: VocabularyEntries) -> None:
        """Point a slot at an adapter's terms; without a wait where they were scanned. Raises a KernelError; ``clear``
        the slot then."""
        entries = entries.scanned()
        self.lora.set_all(slot, entries.lora)
        self.rows.set_all(slot, entries.rows)
        if any(matrix == EMBEDDING and entry.bias is not None for matrix, entry in entries.vectors):
            raise ShapeMismatch("a bias for the embedding; it takes a scale alone")
        self.vectors.set_all(slot, entries.vectors)
        self._num_token_ids[slot] = self.sizes[slot] = entries.num_token_ids or 0

    def num_token_ids(self, slot: int) -> int:
        """One more than the largest token with a row in the slot, which may lie beyond the base's matrix; else 0."""
        return self._num_token_ids.get(slot, 0)

    def clear(self, slot: int) -> None:
        """Empty a slot and let go of its tensors."""
        if self.has_slot(slot):
            self.lora.clear(slot)
            self.rows.clear(slot)
            self.vectors.clear(slot)
        if self._num_token_ids.pop(slot, 0):
            self.sizes[slot] = 0
