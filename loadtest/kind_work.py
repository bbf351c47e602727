"""What an adapter makes a decode step do at least: bytes that are read, and floating-point operations of a row."""

from __future__ import annotations

from typing import NamedTuple

from deltaserve.deltas.blocks import BlockTerm
from deltaserve.deltas.dense import DenseTerm
from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm, SparseTerm, Term
from deltaserve.deltas.rotation_terms import RotationTerm
from deltaserve.deltas.vector_terms import VectorTerm
from deltaserve.deltas.vocabulary import RowsTerm
from deltaserve.model.base import BaseModel
from deltaserve_kernels import unpack_bits
from deltaserve_store.spec import LinearSpec
from loadtest.kind_adapters import PREFIX_TOKENS


class Work(NamedTuple):
    """``bytes_once``: read once for all rows that share the adapter; ``bytes_of_row`` and ``flops`` for each row."""

    bytes_once: int
    bytes_of_row: int
    flops: int


def work_of(folded: FoldedAdapter, base: BaseModel) -> Work:
    """Of the adapter's own numbers, and of the base's that a mask makes each adapter's rows read again: activations,
    which the base's step moves anyway, are not counted. Nor are the places that an order or an entry reads of them:
    they lie in the caches."""
    spec = base.spec
    once, of_row, flops = 0, 0, 0
    for name, terms in folded.terms.items():
        for term in terms:
            if isinstance(term, RowsTerm) and spec.embedding is not None and name == spec.embedding.name:
                of_row += term.values.shape[1] * base.dtype.itemsize  # one row is looked up
                flops += term.values.shape[1]
                continue
            once += term.nbytes
            if isinstance(term, DenseTerm) and term.mask is not None:  # the base's weights are read again
                once += term.mask.shape[0] * term.in_features * base.dtype.itemsize
            flops += _flops(term, spec.linears.get(name))
    for norm in folded.norms.values():
        once += norm.nbytes
        flops += norm.nbytes // 4
    for module in folded.modules.values():
        once += module.nbytes
        flops += 2 * (module.down.numel() + module.up_t.numel())
    if folded.prefix is not None:
        of_position = spec.num_layers * spec.kv_heads * spec.head_dim
        of_row += 2 * PREFIX_TOKENS * of_position * base.dtype.itemsize
        # Two products for each head of the queries, which share K and V in groups.
        flops += 4 * PREFIX_TOKENS * spec.num_layers * base.config.num_attention_heads * spec.head_dim
    return Work(once, of_row, flops)


def _flops(term: Term, linear: LinearSpec | None) -> int:
    if isinstance(term, LowRankTerm):
        return 2 * (term.a.numel() + term.b_t.numel())
    if isinstance(term, SparseTerm | RowsTerm):
        return 2 * term.values.numel()
    if isinstance(term, VectorTerm):
        return sum(tensor.numel() for tensor in term.tensors().values())
    if isinstance(term, RotationTerm) and linear is not None:
        width = linear.in_features if term.side == "input" else linear.out_features
        # Shared blocks are met again and again.
        return 2 * width * sum(factor.blocks.shape[1] for factor in term.factors)
    if isinstance(term, DenseTerm) and term.mask is not None:
        return 2 * int(unpack_bits(term.mask, term.in_features).sum())
    if isinstance(term, DenseTerm):
        return 2 * len(next(iter(term.tensors().values()))) * term.in_features  # each tensor has a row an output
    if isinstance(term, BlockTerm):
        return 2 * term.d.numel()
    raise TypeError(f"work of a {type(term).__name__} is unknown")
