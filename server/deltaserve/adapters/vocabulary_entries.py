"""What a folded adapter does to the embedding and the head, in the form that tables take."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve.deltas.vector_terms import VectorTerm
from deltaserve.deltas.vocabulary import RowsTerm
from deltaserve_kernels import RowsEntry, VectorEntry, VocabularyEntries


def vocabulary_entries(
    folded: FoldedAdapter, matrices: Mapping[str, int], *, is_apart: bool = False
) -> VocabularyEntries:
    """By matrix; ``is_apart``: copies that keep nothing else of the adapter's file in memory."""

    def keep(tensor: Tensor) -> Tensor:
        return tensor.clone() if is_apart else tensor

    def keep_some(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else keep(tensor)

    lora: list[tuple[int, Tensor, Tensor]] = []
    rows: list[tuple[int, RowsEntry]] = []
    vectors: list[tuple[int, VectorEntry]] = []
    for name, index in matrices.items():
        for term in folded.terms.get(name, ()):
            if isinstance(term, LowRankTerm):
                lora.append((index, keep(term.a), keep(term.b_t)))
            elif isinstance(term, RowsTerm):
                rows.append((index, RowsEntry(keep(term.ids), keep(term.values))))
            elif isinstance(term, VectorTerm):
                vectors.append((index, VectorEntry(keep_some(term.scale), keep_some(term.bias))))
    return VocabularyEntries(tuple(lora), tuple(rows), tuple(vectors)).scanned()
