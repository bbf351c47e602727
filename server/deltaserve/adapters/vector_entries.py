"""The vector terms of a folded adapter in the form that tables take."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.deltas.vector_terms import VectorTerm
from deltaserve_kernels import VectorEntries, VectorEntry


def vector_entries(
    folded: FoldedAdapter, linears: Mapping[str, int], norms: Mapping[str, int], *, is_apart: bool = False
) -> VectorEntries:
    """By index; ``is_apart``: copies that keep nothing else of the adapter's file in memory.

    Raises ``ValueError`` for a linear or norm that the base does not have.
    """

    def keep(tensor: Tensor | None) -> Tensor | None:
        return tensor.clone() if is_apart and tensor is not None else tensor

    outputs: list[tuple[int, VectorEntry]] = []
    inputs: list[tuple[int, VectorEntry]] = []
    for name, terms in folded.terms.items():
        for term in terms:
            if not isinstance(term, VectorTerm):
                continue
            index = _index(linears, name, "linear")
            if term.scale is not None or term.bias is not None:
                outputs.append((index, VectorEntry(keep(term.scale), keep(term.bias))))
            if term.in_scale is not None:
                inputs.append((index, VectorEntry(keep(term.in_scale))))
    gains = [
        (_index(norms, name, "norm"), VectorEntry(keep(term.gain), keep(term.shift)))
        for name, term in folded.norms.items()
    ]
    return VectorEntries(tuple(outputs), tuple(inputs), tuple(gains))


def _index(names: Mapping[str, int], name: str, noun: str) -> int:
    index = names.get(name)
    if index is None:
        raise ValueError(f"the base has no {noun} {name!r}")
    return index
