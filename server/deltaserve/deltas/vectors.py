"""Fold vector deltas with the base: scales, biases, norms, and the magnitudes of DoRA (Liu et al., arXiv:2402.09353).

At run time a scale meets the base's whole output, ``W x + b``. Where the method leaves ``b`` alone, the term's bias
carries ``-(scale - 1) * b``; both are linear in the strength, so this holds at every strength.

DoRA: ``scale[i] = magnitude[i] / |w_i + c b_i A|`` with row norms in float32, a few rows at a time; its low-rank part
is ``scale * c B``. A strength s means ``1 + s (scale - 1)`` and ``s B``: norms computed anew at ``s c`` would not give
the base back at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from deltaserve.deltas.prefixes import PromptBase
from deltaserve.deltas.rotations import rotation_biases
from deltaserve.deltas.vector_terms import NormTerm, VectorTerm
from deltaserve.deltas.vocabulary_scales import weights_of
from deltaserve.errors import Reason
from deltaserve_store.dense_deltas import MaskDelta, WholeDelta
from deltaserve_store.parsed import LoraDelta, ParsedAdapter
from deltaserve_store.rotation_deltas import RotationDelta
from deltaserve_store.spec import BaseSpec, LinearSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

ROWS_AT_ONCE = 1024
NUMBERS_AT_ONCE = 32 * 1024 * 1024
_END = 1 << 40


class LinearWeights(Protocol):
    """One linear of the base: ``rows`` i..j of the weight as float32 [j - i, in]; ``bias`` [out] or None."""

    @property
    def bias(self) -> Tensor | None: ...

    def rows(self, i: int, j: int) -> Tensor: ...


class BaseWeights(PromptBase, Protocol):
    """The part of ``BaseModel`` that folding reads."""

    def linear(self, name: str) -> LinearWeights: ...

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]: ...

    def token_rows(self, name: str, ids: Tensor) -> Tensor: ...


def needs_weights(parsed: ParsedAdapter) -> bool:
    """Whether some delta can only be folded with the base's numbers."""
    return any(
        isinstance(delta, VectorDelta | NormDelta | RotationDelta | MaskDelta | WholeDelta)
        or (isinstance(delta, LoraDelta) and delta.magnitude is not None)
        for delta in parsed.deltas
    )


def dora_scale(delta: LoraDelta, magnitude: Tensor, weights: LinearWeights) -> Tensor:
    """fp32 [out]: the magnitudes over the row norms of the changed weight."""
    a, b = delta.a.float(), delta.b.float() * delta.scaling
    step = min(ROWS_AT_ONCE, max(1, NUMBERS_AT_ONCE // a.shape[1]))  # rows of an embedding are as long as it has tokens
    norms = [
        torch.linalg.vector_norm(weights.rows(i, min(i + step, len(b))).cpu() + b[i : i + step] @ a, dim=1)
        for i in range(0, len(b), step)
    ]
    return magnitude.float().flatten() / torch.cat(norms)


def fold_vectors(
    parsed: ParsedAdapter, spec: BaseSpec, base: BaseWeights, scales: Mapping[str, Tensor], reasons: list[Reason]
) -> tuple[dict[str, VectorTerm], dict[str, NormTerm]]:
    """Vector terms by linear and by norm; ``scales`` are those of DoRA. What does not fit is added to ``reasons``."""
    terms: dict[str, VectorTerm] = {}
    norms: dict[str, NormTerm] = {}
    vectors: dict[str, VectorDelta] = {}
    turned: dict[str, Tensor] = {}
    for delta in parsed.deltas:
        if isinstance(delta, VectorDelta):
            if _fits(delta.module, delta.module in vectors, _takes_vectors(delta.module, spec), reasons):
                vectors[delta.module] = delta
        elif isinstance(delta, RotationDelta):
            if delta.out_scale is not None and delta.module in spec.linears:
                turned[delta.module] = delta.out_scale
        elif isinstance(delta, NormDelta) and _fits(
            delta.module, delta.module in norms, delta.module in spec.norms, reasons
        ):
            norms[delta.module] = _fold_norm(delta, base)
    for name, out_scale in turned.items():  # a trained bias may stand beside a rotation
        vectors[name] = replace(vectors.get(name, VectorDelta(name)), out_scale=out_scale)
    for name in dict.fromkeys([*scales, *vectors]):
        delta = vectors.get(name) or VectorDelta(name)
        weights, shape = weights_of(base, spec, name), _spec_of(name, spec)
        if delta.in_bias is not None and delta.in_bias.numel() != shape.in_features:
            found = str(delta.in_bias.numel())
            reasons.append(Reason("shape_mismatch", f"{name} (in_bias)", found, str(shape.in_features)))
            delta = replace(delta, in_bias=None)
        term = _fold_linear(delta, scales.get(name), weights.bias)
        if delta.in_bias is not None:
            shift = _through(delta.in_bias.float(), weights, shape.out_features)
            term = replace(term, bias=shift if term.bias is None else term.bias + shift)
        terms[name] = term
    for name, tensors in [(n, t.tensors()) for n, t in terms.items()] + [(n, t.tensors()) for n, t in norms.items()]:
        size = spec.norms[name].size if name in norms else _spec_of(name, spec).out_features
        for role, tensor in tensors.items():
            wanted = _spec_of(name, spec).in_features if role == "in_scale" else size
            if tensor.numel() != wanted:
                reasons.append(Reason("shape_mismatch", f"{name} ({role})", str(tensor.numel()), str(wanted)))
            elif not bool(torch.isfinite(tensor).all()):
                found = "values that overflow float32 (a row of zeros?)"
                reasons.append(Reason("value_out_of_range", f"{name} ({role})", found, "finite values"))
    return terms, norms


def _takes_vectors(name: str, spec: BaseSpec) -> bool:
    """Linears and the head; of the embedding low rank has a scale, but no vector stands alone."""
    return name in spec.linears or (spec.head is not None and name == spec.head.name)


def _spec_of(name: str, spec: BaseSpec) -> LinearSpec:
    return spec.linears[name] if name in spec.linears else spec.vocabulary[name]


def _through(vector: Tensor, weights: LinearWeights, out_features: int) -> Tensor:
    """``W vector``, fp32 [out], a few rows of W at a time."""
    starts = range(0, out_features, ROWS_AT_ONCE)
    pieces = [weights.rows(i, min(i + ROWS_AT_ONCE, out_features)).cpu() @ vector for i in starts]
    return torch.cat(pieces)


def _fits(module: str, is_second: bool, is_known: bool, reasons: list[Reason]) -> bool:
    if not is_known:
        reasons.append(Reason("unknown_module", module, "a vector", "a linear or norm of the base"))
    elif is_second:
        reasons.append(Reason("duplicate_module", module, "two deltas", "one delta per linear or norm"))
    return is_known and not is_second


def _fold_linear(delta: VectorDelta, dora: Tensor | None, base_bias: Tensor | None) -> VectorTerm:
    scale = dora if delta.out_scale is None else delta.out_scale.float().flatten()
    bias = None if delta.bias is None else delta.bias.float()
    stored = None if base_bias is None else base_bias.float().cpu()
    if delta.new_bias is not None:
        replaced = delta.new_bias.float() if stored is None else delta.new_bias.float() - stored
        bias = replaced if bias is None else bias + replaced
    if scale is not None and stored is not None and not delta.scales_bias:
        kept = stored - scale * stored
        bias = kept if bias is None else bias + kept
    if delta.bias_scale is not None and stored is not None:
        grown = (delta.bias_scale.float() - 1) * stored
        bias = grown if bias is None else bias + grown
    in_scale = None if delta.in_scale is None else delta.in_scale.float().flatten()
    return VectorTerm(*(None if t is None else t.contiguous() for t in (scale, bias, in_scale)))


def _fold_norm(delta: NormDelta, base: BaseWeights) -> NormTerm:
    gain, shift = norm_change(delta, base)
    return NormTerm(*(None if t is None else t.contiguous() for t in (gain, shift)))


def norm_change(delta: NormDelta, base: BaseWeights) -> tuple[Tensor | None, Tensor | None]:
    """Differences of weight and bias, fp32 [H]. Raises ``ValueError`` for a bias that the base's norm does not have."""

    def difference(given: Tensor | None, stored: Tensor | None) -> Tensor | None:
        if given is None or not delta.replaces:
            return None if given is None else given.float()
        if stored is None:
            raise ValueError(f"{delta.module} of the base has no bias")
        return given.float() - stored.float().cpu()

    weight, bias = base.norm(delta.module)
    return difference(delta.gain, weight), difference(delta.shift, bias)


# ---- The oracle: from the file's own tensors, independently of the terms ----


def dense_vectors(parsed: ParsedAdapter, linear: str, weight: Tensor) -> Tensor:
    """fp32 [out, in]: what scales and magnitudes do to a linear's weight, its low-rank part not included unless DoRA
    puts it inside the norm."""
    changed = weight.clone()
    for delta in parsed.deltas:
        if isinstance(delta, LoraDelta) and delta.module == linear and delta.magnitude is not None:
            changed += delta.scaling * (delta.b.float() @ delta.a.float())
            changed *= (delta.magnitude.float().flatten() / changed.norm(dim=1))[:, None]
    for delta in parsed.deltas:
        if isinstance(delta, VectorDelta) and delta.module == linear:
            changed = changed if delta.out_scale is None else delta.out_scale.float().view(-1, 1) * changed
            changed = changed if delta.in_scale is None else changed * delta.in_scale.float().view(1, -1)
    return changed - weight


def gates_of(parsed: ParsedAdapter, linear: str) -> VectorDelta | None:
    """The delta that scales both sides of a linear, if there is one."""
    found = (d for d in parsed.deltas if isinstance(d, VectorDelta) and d.module == linear and d.is_two_sided)
    return next(found, None)


def dense_gates(delta: VectorDelta, weight: Tensor, strength: float) -> Tensor:
    """fp32 [out, in]: what scales of both sides change of a weight, each ``1 + strength * (scale - 1)``."""
    if delta.out_scale is None or delta.in_scale is None:
        raise ValueError(f"{delta.module} is scaled on one side")
    rows, columns = (1 + strength * (scale.float() - 1) for scale in (delta.out_scale, delta.in_scale))
    return rows.view(-1, 1) * weight * columns - weight


def dense_biases(parsed: ParsedAdapter, base: BaseWeights) -> Mapping[str, Callable[[], Tensor]]:
    """Differences of biases [out] by linear: what the file adds, puts in its place, multiplies it by or turns."""
    return {
        **rotation_biases(parsed, base),
        **_given_biases(parsed, base),
    }


def _given_biases(parsed: ParsedAdapter, base: BaseWeights) -> Mapping[str, Callable[[], Tensor]]:
    return {
        delta.module: partial(_dense_bias, delta, base.linear(delta.module))
        for delta in parsed.deltas
        if isinstance(delta, VectorDelta)
        and (
            any(vector is not None for vector in (delta.bias, delta.new_bias, delta.in_bias, delta.bias_scale))
            or (delta.scales_bias and delta.out_scale is not None)
        )
    }


def _dense_bias(delta: VectorDelta, weights: LinearWeights) -> Tensor:
    # A slice ends where the weight does.
    moved = None if delta.in_bias is None else (weights.rows(0, _END).cpu() * delta.in_bias.float()).sum(dim=1)
    vectors = (delta.bias, delta.new_bias, delta.out_scale, moved, delta.bias_scale)
    given = [t for t in vectors if t is not None]
    before = torch.zeros(given[0].numel()) if weights.bias is None else weights.bias.float().cpu()
    after = before if delta.new_bias is None else delta.new_bias.float()
    if delta.scales_bias and delta.out_scale is not None:
        after = delta.out_scale.float().flatten() * after
    if delta.bias_scale is not None:
        after = delta.bias_scale.float() * after
    after = after if moved is None else after + moved
    return after - before if delta.bias is None else after - before + delta.bias.float()


def dense_norms(parsed: ParsedAdapter, base: BaseWeights) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Differences of weight and bias by norm."""
    return {d.module: norm_change(d, base) for d in parsed.deltas if isinstance(d, NormDelta)}
