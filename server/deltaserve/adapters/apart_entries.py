"""The dense differences and residual modules of a folded adapter in the form that tables take."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from deltaserve.deltas.dense import DenseTerm
from deltaserve.deltas.folded import FoldedAdapter
from deltaserve_kernels import ApartEntries, DenseEntry, ModuleEntry


def apart_entries(
    folded: FoldedAdapter, linears: Mapping[str, int], points: Mapping[str, int], *, is_apart: bool = False
) -> ApartEntries:
    """By index; ``is_apart``: copies that keep nothing else of the adapter's file in memory.

    Raises ``ValueError`` for a linear or an attach point that the base does not have.
    """

    def keep(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {role: tensor.clone() if is_apart else tensor for role, tensor in tensors.items()}

    dense: list[tuple[int, DenseEntry]] = []
    for name, terms in folded.terms.items():
        for term in terms:
            if isinstance(term, DenseTerm):
                kept = keep(term.tensors())
                roles = ("delta", "signs", "sign_scale", "mask")
                entry = DenseEntry(term.in_features, *(kept.get(role) for role in roles))
                dense.append((_index(linears, name, "linear"), entry))
    modules: list[tuple[int, ModuleEntry]] = []
    for point, module in folded.modules.items():
        kept = keep(module.tensors())
        biases = kept.get("down_bias"), kept.get("up_bias")
        reads = -1
        if module.is_parallel:
            reads = _index(points, f"{point.removesuffix('_out')}_in", "attach point")
        entry_of_point = ModuleEntry(kept["down"], kept["up_t"], *biases, module.activation, reads)
        modules.append((_index(points, point, "attach point"), entry_of_point))
    return ApartEntries(tuple(dense), tuple(modules))


def _index(names: Mapping[str, int], name: str, noun: str) -> int:
    index = names.get(name)
    if index is None:
        raise ValueError(f"the base has no {noun} {name!r}")
    return index
