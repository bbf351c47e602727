"""Fold a checked adapter with the base into runtime terms, once, at admission; and the dense oracle of the same delta.

Low rank (Hu et al., LoRA, arXiv:2106.09685; rank-stabilised scaling, arXiv:2312.03732): ``dW = scaling * B A``; the
file's reader has already turned alpha and rank into ``scaling``. It is multiplied into ``B`` in float32 before the one
cast to the serving dtype. Sparse (SHiRA, arXiv:2406.13175, and our own format): coordinates become compressed rows.
Whole weights are in ``dense``, residual modules in ``modules``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from deltaserve.deltas.blocks import BlockTerm, dense_block, fold_block
from deltaserve.deltas.blocks import misfit as block_misfit
from deltaserve.deltas.dense import DenseTerm, change_of, fold_mask, fold_signs_or_matrix, fold_whole, misfit
from deltaserve.deltas.folded import FOLD_VERSION, FoldedAdapter, LowRankTerm, SparseTerm, Term, dtype_name
from deltaserve.deltas.modules import fold_modules
from deltaserve.deltas.prefixes import PrefixTerm, fold_prefix, prefix_overflow
from deltaserve.deltas.rotations import dense_rotation, fold_rotations, rotation_of
from deltaserve.deltas.vector_terms import NormTerm
from deltaserve.deltas.vectors import (
    BaseWeights,
    dense_gates,
    dense_vectors,
    dora_scale,
    fold_vectors,
    gates_of,
    needs_weights,
)
from deltaserve.deltas.vocabulary import fold_rows, is_of_vocabulary, needs_token_rows
from deltaserve.deltas.vocabulary_scales import weights_of
from deltaserve.errors import AdapterRefused, Reason
from deltaserve_store.block_deltas import BlockDelta, RowsDelta
from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.dense_deltas import DenseDelta, MaskDelta, SignDelta, WholeDelta
from deltaserve_store.parsed import LoraDelta, ParsedAdapter, SparseDelta
from deltaserve_store.spec import BaseSpec, LinearSpec
from deltaserve_store.vector_deltas import NormDelta

Matrix = LoraDelta | SparseDelta | DenseDelta | WholeDelta | MaskDelta | SignDelta | BlockDelta
_MATRICES = (LoraDelta, SparseDelta, DenseDelta, WholeDelta, MaskDelta, SignDelta, BlockDelta)


def fold_key(fingerprint: str, dtype: torch.dtype) -> str:
    """Name of the derived folder that holds the folded form for one base, dtype and fold version."""
    return f"{fingerprint}-{dtype_name(dtype)}-fold{FOLD_VERSION}"


def fold(parsed: ParsedAdapter, spec: BaseSpec, dtype: torch.dtype, base: BaseWeights | None = None) -> FoldedAdapter:
    """Turn every delta of ``parsed`` into a term in ``dtype``, in the base's order of linears.

    ``base`` is needed for vectors and magnitudes, which meet the base's numbers; without it they are a ``ValueError``.
    Raises ``AdapterRefused`` naming each delta that the base has no linear for, that is given twice, that does not
    fit its linear, or whose values leave the range of ``dtype``. Nothing is dropped: deltas that still need the base's
    weights (``ParsedAdapter.on_base``) raise ``ValueError``.
    """
    if parsed.weight_deltas:
        raise ValueError("this adapter multiplies the base's weights; fold parsed.on_base(...)")
    reasons: list[Reason] = []
    terms: dict[str, tuple[Term, ...]] = {}
    scales: dict[str, Tensor] = {}
    if base is None and (needs_weights(parsed) or needs_token_rows(parsed)):
        raise ValueError("these deltas are folded with the base's weights; give the base")
    matrices = [delta for delta in parsed.deltas if isinstance(delta, _MATRICES)]
    for delta in sorted(matrices, key=lambda delta: (delta.module, isinstance(delta, SparseDelta))):
        linear = spec.linears.get(delta.module) or (
            spec.vocabulary.get(delta.module) if isinstance(delta, LoraDelta) else None
        )
        if linear is None:
            reasons.append(Reason("unknown_module", delta.module, "a delta", "a linear of the base"))
        elif wrong := _misfit(delta, linear):
            reasons.append(wrong)
        else:
            if isinstance(delta, LoraDelta):
                if delta.magnitude is not None and base is not None:
                    scales[delta.module] = dora_scale(delta, delta.magnitude, weights_of(base, spec, delta.module))
                term: Term = _fold_low_rank(delta, dtype, scales.get(delta.module))
            elif isinstance(delta, DenseDelta | SignDelta):
                term = fold_signs_or_matrix(delta, linear, dtype)
            elif isinstance(delta, BlockDelta):
                term = fold_block(delta, linear, dtype)
            else:
                term = _fold_entries(delta, linear, dtype, base)
            reasons.extend(_overflow(delta.module, term, dtype))
            if any(isinstance(other, type(term)) for other in terms.get(delta.module, ())):
                reasons.append(Reason("duplicate_module", delta.module, "two deltas", "one delta of a kind per linear"))
            terms[delta.module] = (*terms.get(delta.module, ()), term)
    norms: dict[str, NormTerm] = {}
    if base is not None:
        vectors, norms = fold_vectors(parsed, spec, base, scales, reasons)
        for name, vector in vectors.items():
            terms[name] = (*terms.get(name, ()), vector.narrowed() if name in spec.linears else vector)
        rows = [delta for delta in parsed.deltas if isinstance(delta, RowsDelta)]
        for name, trained in fold_rows(rows, spec, dtype, base, reasons, parsed.num_token_ids).items():
            terms[name] = (*terms.get(name, ()), trained)
    for name, rotation in fold_rotations(parsed, spec, dtype, reasons).items():
        terms[name] = (*terms.get(name, ()), rotation)
    modules = fold_modules(parsed, spec, dtype, reasons)
    prefix: PrefixTerm | None = None
    if parsed.prefix is not None:
        prefix = fold_prefix(parsed.prefix, spec, dtype, base)
        reasons += prefix_overflow(prefix, _range(dtype))
    if reasons:
        raise _refusal(reasons)
    order = {name: index for index, name in enumerate((*spec.linears, *spec.vocabulary))}
    ordered = {name: terms[name] for name in sorted(terms, key=order.__getitem__)}
    return FoldedAdapter(ordered, spec.fingerprint, dtype, norms, modules, prefix, parsed.num_token_ids)


def dense_delta(
    adapter: ParsedAdapter | FoldedAdapter,
    linear: str,
    spec: BaseSpec,
    base: BaseWeights | None = None,
    strength: float = 1.0,
    *,
    as_served: bool = False,
) -> Tensor:
    """The delta of one linear at ``strength``, float32 ``[out, in]``: what the runtime must be equivalent to.

    From a ``ParsedAdapter`` it is computed from the file's own tensors, independently of ``fold``; zeros where the
    adapter leaves the linear alone. Of a folded adapter, low-rank, sparse, block and dense terms only; masks
    among them need ``base``. ``as_served``: where a delta was converted with loss, what its factors multiply to
    instead of the method's own formula.
    """
    shape = spec.linears[linear]
    dense = torch.zeros(shape.out_features, shape.in_features)
    if isinstance(adapter, FoldedAdapter):
        for term in adapter.terms.get(linear, ()):
            if isinstance(term, LowRankTerm):
                dense += term.b_t.float().t() @ term.a.float()
            elif isinstance(term, BlockTerm):
                dense += term.dense()
            elif isinstance(term, SparseTerm):
                rows = torch.repeat_interleave(torch.arange(shape.out_features), term.indptr.long().diff())
                dense.index_put_((rows, term.cols.long()), term.values.float(), accumulate=True)
            elif isinstance(term, DenseTerm):
                dense += term.matrix(None if base is None else base.linear(linear))
        return dense.mul_(strength)
    weight = dense  # where nothing meets the base's numbers, only its shape is asked for
    if base is not None and needs_weights(adapter):
        weight = base.linear(linear).rows(0, shape.out_features).cpu()
        # Nothing else changes the weight of a linear that is gated on both sides or turned.
        if (gates := gates_of(adapter, linear)) is not None:
            return dense_gates(gates, weight, strength)
        if (rotation := rotation_of(adapter, linear)) is not None:
            return dense_rotation(rotation, weight, strength)
        dense += dense_vectors(adapter, linear, weight)
    for delta in adapter.deltas:
        if isinstance(delta, BottleneckDelta) or delta.module != linear:
            continue
        if isinstance(delta, MaskDelta | WholeDelta) and base is None:
            raise ValueError("these deltas are met with the base's weights; give the base")
        if isinstance(delta, DenseDelta | WholeDelta | MaskDelta | SignDelta):
            dense += change_of(delta, weight)
        elif isinstance(delta, LoraDelta) and delta.magnitude is None:
            # A converted delta is checked against its own method's formula, not against the conversion.
            own = delta.dense if delta.is_exact or not as_served else None
            dense += own() if own is not None else delta.scaling * (delta.b.float() @ delta.a.float())
        elif isinstance(delta, BlockDelta):
            dense += dense_block(delta, shape)
        elif isinstance(delta, SparseDelta):
            if delta.dense is not None:
                dense += delta.dense()
                continue
            dense.index_put_((delta.rows.long(), delta.cols.long()), delta.values.float(), accumulate=True)
    return dense.mul_(strength)


def dense_deltas(
    adapter: ParsedAdapter | FoldedAdapter,
    spec: BaseSpec,
    base: BaseWeights | None = None,
    strength: float = 1.0,
    *,
    as_served: bool = False,
) -> Mapping[str, Callable[[], Tensor]]:
    """Lazy ``dense_delta`` of every linear the adapter changes: one dense matrix lives at a time."""
    if isinstance(adapter, FoldedAdapter):
        names = [name for name in adapter.terms if name in spec.linears]
    else:
        others = NormDelta | BottleneckDelta
        names = [d.module for d in adapter.deltas if not isinstance(d, others) and not is_of_vocabulary(d, spec)]
    return {name: partial(dense_delta, adapter, name, spec, base, strength, as_served=as_served) for name in names}


def _refusal(reasons: list[Reason]) -> AdapterRefused:
    message = f"The adapter cannot be folded with this base: {len(reasons)} finding(s), first {reasons[0].where!r}."
    return AdapterRefused(message, reasons=reasons)


def _misfit(delta: Matrix, linear: LinearSpec) -> Reason | None:
    if isinstance(delta, DenseDelta | WholeDelta | MaskDelta | SignDelta):
        return misfit(delta, linear)
    if isinstance(delta, BlockDelta):
        return block_misfit(delta, linear)
    if isinstance(delta, LoraDelta):
        found, rank = (tuple(delta.a.shape), tuple(delta.b.shape)), delta.a.shape[0]
        allowed = ((rank, linear.in_features), (linear.out_features, rank))
        return None if found == allowed else Reason("shape_mismatch", delta.module, str(found), str(allowed))
    count = delta.values.numel()
    if not delta.rows.numel() == delta.cols.numel() == count:
        found_lengths = f"{delta.rows.numel()} rows, {delta.cols.numel()} columns, {count} values"
        return Reason("shape_mismatch", delta.module, found_lengths, "as many of each")
    for what, index, size in (("row", delta.rows, linear.out_features), ("column", delta.cols, linear.in_features)):
        if count and not (int(index.min()) >= 0 and int(index.max()) < size):
            found_range = f"{int(index.min())}..{int(index.max())}"
            return Reason("index_out_of_range", delta.module, f"{what} {found_range}", f"0..{size - 1}")
    return None


def _fold_low_rank(delta: LoraDelta, dtype: torch.dtype, row_scale: Tensor | None = None) -> LowRankTerm:
    b = delta.b.float() * delta.scaling
    b_t = (b if row_scale is None else b * row_scale[:, None]).t().contiguous()
    return LowRankTerm(a=delta.a.to(dtype).contiguous(), b_t=b_t.to(dtype))


def _fold_entries(
    delta: SparseDelta | MaskDelta | WholeDelta, linear: LinearSpec, dtype: torch.dtype, base: BaseWeights | None
) -> Term:
    if isinstance(delta, MaskDelta | WholeDelta):
        if base is None:
            raise ValueError("these deltas are folded with the base's weights; give the base")
        if isinstance(delta, WholeDelta):
            return fold_whole(delta, linear, base.linear(delta.module), dtype)
        taken_out = fold_mask(delta, linear, base.linear(delta.module))
        return taken_out if isinstance(taken_out, DenseTerm) else _fold_sparse(taken_out, linear, dtype)
    return _fold_sparse(delta, linear, dtype)


def _fold_sparse(delta: SparseDelta, linear: LinearSpec, dtype: torch.dtype) -> SparseTerm:
    flat = delta.rows.long() * linear.in_features + delta.cols.long()
    order = torch.argsort(flat)
    flat = flat[order]
    counts = torch.bincount(flat // linear.in_features, minlength=linear.out_features)
    indptr = torch.zeros(linear.out_features + 1, dtype=torch.int32)
    indptr[1:] = counts.cumsum(0)
    cols = (flat % linear.in_features).to(torch.int32)
    return SparseTerm(indptr=indptr, cols=cols, values=delta.values[order].float().to(dtype).contiguous())


def _overflow(module: str, term: Term, dtype: torch.dtype) -> list[Reason]:
    """A finite file can still overflow where scaling is multiplied in or the dtype is narrower."""
    parts = {"A": term.a, "scaling * B": term.b_t} if isinstance(term, LowRankTerm) else {}
    parts |= {"values": term.values} if isinstance(term, SparseTerm) else {}
    parts |= term.tensors() if isinstance(term, DenseTerm) else {}
    parts |= {"block": term.d} if isinstance(term, BlockTerm) else {}
    return [
        Reason("value_out_of_range", f"{module} ({part})", "values that overflow the serving dtype", _range(dtype))
        for part, tensor in parts.items()
        if not bool(torch.isfinite(tensor).all())
    ]


def _range(dtype: torch.dtype) -> str:
    return f"magnitudes up to {torch.finfo(dtype).max:g} ({dtype_name(dtype)})"
