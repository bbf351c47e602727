"""Fold a checked adapter with the base into runtime terms, once, at admission; and the dense oracle of the same delta.

Low rank (Hu et al., LoRA, arXiv:2106.09685; rank-stabilised scaling, arXiv:2312.03732): ``dW = scaling * B A``; the
file's reader has already turned alpha and rank into ``scaling``. It is multiplied into ``B`` in float32 before the one
cast to the serving dtype. Sparse (SHiRA, arXiv:2406.13175, and our own format): coordinates become compressed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from deltaserve.deltas.folded import FOLD_VERSION, FoldedAdapter, LowRankTerm, SparseTerm, Term, dtype_name
from deltaserve.deltas.prefixes import PrefixTerm, fold_prefix, prefix_overflow
from deltaserve.deltas.vector_terms import NormTerm
from deltaserve.deltas.vectors import BaseWeights, dense_vectors, dora_scale, fold_vectors, needs_weights
from deltaserve.errors import AdapterRefused, Reason
from deltaserve_store.parsed import LoraDelta, ParsedAdapter, SparseDelta
from deltaserve_store.spec import BaseSpec, LinearSpec
from deltaserve_store.vector_deltas import NormDelta


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
    if base is None and needs_weights(parsed):
        raise ValueError("these deltas are folded with the base's weights; give the base")
    matrices = [delta for delta in parsed.deltas if isinstance(delta, LoraDelta | SparseDelta)]
    for delta in sorted(matrices, key=lambda delta: delta.module):
        linear = spec.linears.get(delta.module)
        if linear is None:
            reasons.append(Reason("unknown_module", delta.module, "a delta", "a linear of the base"))
        elif delta.module in terms:
            reasons.append(Reason("duplicate_module", delta.module, "two deltas", "one delta per linear"))
        elif misfit := _misfit(delta, linear):
            reasons.append(misfit)
        else:
            if isinstance(delta, LoraDelta):
                if delta.magnitude is not None and base is not None:
                    scales[delta.module] = dora_scale(delta, delta.magnitude, base.linear(delta.module))
                term: Term = _fold_low_rank(delta, dtype, scales.get(delta.module))
            else:
                term = _fold_sparse(delta, linear, dtype)
            reasons.extend(_overflow(delta.module, term, dtype))
            terms[delta.module] = (term,)
    norms: dict[str, NormTerm] = {}
    if base is not None:
        vectors, norms = fold_vectors(parsed, spec, base, scales, reasons)
        for name, vector in vectors.items():
            terms[name] = (*terms.get(name, ()), vector)
    prefix: PrefixTerm | None = None
    if parsed.prefix is not None:
        prefix = fold_prefix(parsed.prefix, spec, dtype, base)
        reasons += prefix_overflow(prefix, _range(dtype))
    if reasons:
        raise AdapterRefused(
            f"The adapter cannot be folded with this base: {len(reasons)} finding(s), first {reasons[0].where!r}.",
            reasons=reasons,
        )
    order = {name: index for index, name in enumerate(spec.linears)}
    ordered = {name: terms[name] for name in sorted(terms, key=order.__getitem__)}
    return FoldedAdapter(terms=ordered, base_fingerprint=spec.fingerprint, dtype=dtype, norms=norms, prefix=prefix)


def dense_delta(
    adapter: ParsedAdapter | FoldedAdapter, linear: str, spec: BaseSpec, base: BaseWeights | None = None
) -> Tensor:
    """The delta of one linear as a float32 matrix ``[out, in]``: what the runtime must be equivalent to.

    From a ``ParsedAdapter`` it is computed from the file's own tensors, independently of ``fold``; zeros where the
    adapter leaves the linear alone. Of a folded adapter, low-rank and sparse terms only.
    """
    shape = spec.linears[linear]
    dense = torch.zeros(shape.out_features, shape.in_features)
    if isinstance(adapter, FoldedAdapter):
        for term in adapter.terms.get(linear, ()):
            if isinstance(term, LowRankTerm):
                dense += term.b_t.float().t() @ term.a.float()
            elif isinstance(term, SparseTerm):
                rows = torch.repeat_interleave(torch.arange(shape.out_features), term.indptr.long().diff())
                dense.index_put_((rows, term.cols.long()), term.values.float(), accumulate=True)
        return dense
    if base is not None and needs_weights(adapter):
        dense += dense_vectors(adapter, linear, base.linear(linear).rows(0, shape.out_features).cpu())
    for delta in adapter.deltas:
        if delta.module != linear or (isinstance(delta, LoraDelta) and delta.magnitude is not None):
            continue
        if isinstance(delta, LoraDelta):
            # A converted delta is checked against its own method's formula, not against the conversion.
            dense += delta.dense() if delta.dense is not None else delta.scaling * (delta.b.float() @ delta.a.float())
        elif isinstance(delta, SparseDelta):
            dense.index_put_((delta.rows.long(), delta.cols.long()), delta.values.float(), accumulate=True)
    return dense


def dense_deltas(
    adapter: ParsedAdapter | FoldedAdapter, spec: BaseSpec, base: BaseWeights | None = None
) -> Mapping[str, Callable[[], Tensor]]:
    """Lazy ``dense_delta`` of every linear the adapter changes: one dense matrix lives at a time."""
    if isinstance(adapter, FoldedAdapter):
        names = list(adapter.terms)
    else:
        names = [delta.module for delta in adapter.deltas if not isinstance(delta, NormDelta)]
    return {name: partial(dense_delta, adapter, name, spec, base) for name in names}


def _misfit(delta: LoraDelta | SparseDelta, linear: LinearSpec) -> Reason | None:
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
    return [
        Reason("value_out_of_range", f"{module} ({part})", "values that overflow the serving dtype", _range(dtype))
        for part, tensor in parts.items()
        if not bool(torch.isfinite(tensor).all())
    ]


def _range(dtype: torch.dtype) -> str:
    return f"magnitudes up to {torch.finfo(dtype).max:g} ({dtype_name(dtype)})"
