"""The vector terms and rotations of a folded adapter in the form that tables take."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.deltas.rotation_terms import RotationTerm
from deltaserve.deltas.vector_terms import VectorTerm
from deltaserve_kernels import RotationEntry, RotationFactor, VectorEntries, VectorEntry


def vector_entries(
    folded: FoldedAdapter,
    linears: Mapping[str, int],
    norms: Mapping[str, int],
    *,
    others: Collection[str] = (),
    is_apart: bool = False,
    is_wide: bool = False,
) -> VectorEntries:
    """By index; ``is_apart``: copies that keep nothing else of the adapter's file in memory; ``is_wide``: all vectors
    in fp32. ``others``: names whose terms belong to another table (embedding and head).

    Raises ``ValueError`` for a linear or norm that the base does not have.
    """

    def keep(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        wide = tensor.float() if is_wide else tensor
        return wide.clone() if is_apart and wide is tensor else wide

    def turn(factors: RotationEntry) -> RotationEntry:
        if not is_apart:
            return factors
        return tuple(
            RotationFactor(blocks.clone(), None if order is None else order.clone()) for blocks, order in factors
        )

    outputs: list[tuple[int, VectorEntry]] = []
    inputs: list[tuple[int, VectorEntry]] = []
    rotations: dict[str, list[tuple[int, RotationEntry]]] = {"input": [], "output": []}
    for name, terms in folded.terms.items():
        for term in terms:
            if name in others or not isinstance(term, VectorTerm | RotationTerm):
                continue
            index = _index(linears, name, "linear")
            if isinstance(term, RotationTerm):
                rotations[term.side].append((index, turn(term.factors)))
                continue
            if term.scale is not None or term.bias is not None:
                outputs.append((index, VectorEntry(keep(term.scale), keep(term.bias))))
            if term.in_scale is not None:
                inputs.append((index, VectorEntry(keep(term.in_scale))))
    gains = [
        (_index(norms, name, "norm"), VectorEntry(keep(term.gain), keep(term.shift)))
        for name, term in folded.norms.items()
    ]
    of_side = {side: tuple(entries) for side, entries in rotations.items()}
    return VectorEntries(tuple(outputs), tuple(inputs), tuple(gains), of_side["input"], of_side["output"])


def _index(names: Mapping[str, int], name: str, noun: str) -> int:
    index = names.get(name)
    if index is None:
        raise ValueError(f"the base has no {noun} {name!r}")
    return index
