"""An adapter as a sum of changes, so that adapters can be added: per linear and per norm what it adds to the base.

    dW = b @ a + S + diag(out_gate) W + W diag(in_gate),   bias += bias,   weight += gain,   norm's bias += shift

A gate is a scale minus 1. Everything is linear: at weight w each part counts w times. A method that puts numbers in the
base's place (weights and biases saved whole, norms, DoRA's magnitudes) becomes its difference from the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.dense_deltas import DenseDelta, SignDelta, WholeDelta
from deltaserve_store.parsed import LoraDelta, ParsedAdapter, SparseDelta
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltaserve_trainer.errors import MergeRefused
from deltaserve_trainer.merging.low_rank import Factors, concatenated


class BaseWeights(Protocol):
    """The frozen base in float32: ``weight`` [out, in] and ``bias`` [out] of a linear, ``norm`` (weight, bias)."""

    def weight(self, linear: str) -> Tensor: ...

    def bias(self, linear: str) -> Tensor | None: ...

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True, slots=True)
class Entries:
    """Sparse part: ``keys`` int64 [k], ascending, ``row * in_features + col``; ``values`` float32 [k]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class LinearUpdate:
    """``vectors``: some of ``bias`` [out], ``out_gate`` [out], ``in_gate`` [in], float32."""

    shape: tuple[int, int]
    factors: Factors | None = None
    entries: Entries | None = None
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def has_gate(self) -> bool:
        return "out_gate" in self.vectors or "in_gate" in self.vectors

    @property
    def has_matrix(self) -> bool:
        """Whether the weight changes (and not only the bias)."""
        return self.factors is not None or self.entries is not None or self.has_gate

    def dense(self, weight: Callable[[], Tensor]) -> Tensor:
        """float32 [out, in]; ``weight`` is asked for the base's only where a gate multiplies it."""
        total = torch.zeros(self.shape) if self.factors is None else self.factors.dense()
        if self.entries is not None:
            total.view(-1)[self.entries.keys] += self.entries.values
        if (gate := self.vectors.get("out_gate")) is not None:
            total += gate[:, None] * weight()
        if (gate := self.vectors.get("in_gate")) is not None:
            total += gate[None, :] * weight()
        return total


@dataclass(frozen=True, slots=True)
class Update:
    """``norms``: some of ``gain`` and ``shift`` [size] by norm."""

    linears: Mapping[str, LinearUpdate]
    norms: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def update_of(adapter: ParsedAdapter, spec: BaseSpec, base: BaseWeights) -> Update:
    """Raises ``MergeRefused`` for whatever has no such form, also where only a field tells of it."""
    _check_known(adapter, _KNOWN_OF_ADAPTER, "the adapter")
    linears: dict[str, LinearUpdate] = {}
    norms: dict[str, Mapping[str, Tensor]] = {}
    for delta in adapter.on_base(base.weight).deltas:
        if isinstance(delta, BottleneckDelta):
            raise MergeRefused(f"the residual module at {delta.point} is no term of a linear; only those add up")
        if isinstance(delta, (NormDelta, *_TERMS)):
            _check_known(delta, _KNOWN, delta.module)
        if isinstance(delta, NormDelta):
            norms[delta.module] = _norm_change(delta, base)
        elif isinstance(delta, _TERMS) and delta.module in spec.linears:
            linear = spec.linears[delta.module]
            shape = (linear.out_features, linear.in_features)
            change = _linear_change(delta, shape, base)
            before = linears.get(delta.module)
            linears[delta.module] = change if before is None else add_linears([(1.0, before), (1.0, change)])
        else:
            raise MergeRefused(
                f"{type(delta).__name__} of {delta.module} is no low-rank, sparse, dense or vector term of a linear; "
                "only those add up"
            )
    return Update(linears, norms)


_TERMS = (LoraDelta, SparseDelta, DenseDelta, WholeDelta, SignDelta, VectorDelta)
_KNOWN_OF_ADAPTER = frozenset(
    {
        *("kind", "more_kinds", "file_format", "deltas", "weight_deltas", "config", "base_name", "base_fingerprint"),
        *("rank", "num_parameters", "chat_template", "stop_token_ids", "skipped", "notes"),
    }
)
_KNOWN = frozenset(
    {
        *("module", "a", "b", "scaling", "magnitude", "dense", "rows", "cols", "values", "gain", "shift", "replaces"),
        *("out_scale", "in_scale", "bias", "new_bias", "scales_bias", "delta", "signs", "scale", "weight"),
    }
)


def _check_known(holder: Any, known: frozenset[str], where: str) -> None:
    """Nothing is left out in silence: a field that came later, and says something, is refused by name."""
    for item in fields(holder):
        value = getattr(holder, item.name)
        if item.name not in known and not (value is item.default or (isinstance(value, tuple) and not value)):
            raise MergeRefused(f"{where} has {item.name}, which has no part in a sum of terms")


def add_linears(parts: Sequence[tuple[float, LinearUpdate]]) -> LinearUpdate:
    """The weighted sum, without forming a matrix. Parts of weight 0 leave nothing behind."""
    parts = [(weight, part) for weight, part in parts if weight != 0] or [(0.0, LinearUpdate(parts[0][1].shape))]
    factors = [(weight, part.factors) for weight, part in parts if part.factors is not None]
    entries = [(weight, part.entries) for weight, part in parts if part.entries is not None]
    return LinearUpdate(
        parts[0][1].shape,
        factors=concatenated(factors) if factors else None,
        entries=_add_entries(entries) if entries else None,
        vectors=add_vectors([(weight, part.vectors) for weight, part in parts]),
    )


def add_vectors(parts: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for weight, vectors in parts:
        for name, vector in vectors.items() if weight != 0 else ():
            total[name] = weight * vector if name not in total else total[name] + weight * vector
    return total


def entries_of(matrix: Tensor) -> Entries:
    """Every number of a dense matrix that is not zero."""
    keys = matrix.flatten().nonzero().flatten()
    return Entries(keys, matrix.flatten()[keys])


def _add_entries(parts: Sequence[tuple[float, Entries]]) -> Entries:
    keys, places = torch.cat([entries.keys for _, entries in parts]).unique(sorted=True, return_inverse=True)
    values = torch.cat([weight * entries.values for weight, entries in parts])
    return Entries(keys, torch.zeros(len(keys)).index_add_(0, places, values))


def _linear_change(
    delta: LoraDelta | SparseDelta | DenseDelta | WholeDelta | SignDelta | VectorDelta,
    shape: tuple[int, int],
    base: BaseWeights,
) -> LinearUpdate:
    if isinstance(delta, WholeDelta):
        return LinearUpdate(shape, entries=entries_of(delta.weight.float() - base.weight(delta.module)))
    if isinstance(delta, DenseDelta | SignDelta):  # a matrix is as many entries as it has numbers
        matrix = delta.delta.float() if isinstance(delta, DenseDelta) else delta.dense(shape[1])
        return LinearUpdate(shape, entries=entries_of(matrix))
    if isinstance(delta, SparseDelta):
        keys = delta.rows.long() * shape[1] + delta.cols.long()
        order = keys.argsort()
        return LinearUpdate(shape, entries=Entries(keys[order], delta.values.float()[order]))
    if isinstance(delta, LoraDelta):
        factors = Factors(delta.a.float(), delta.b.float() * delta.scaling)
        if delta.magnitude is None:
            return LinearUpdate(shape, factors=factors)
        # DoRA: scale * (W + b a), scale = magnitude / row norms of the sum; the bias keeps its size.
        norms = torch.linalg.vector_norm(base.weight(delta.module) + factors.dense(), dim=1)
        scale = delta.magnitude.float().flatten() / norms
        return LinearUpdate(shape, Factors(factors.a, scale[:, None] * factors.b), vectors={"out_gate": scale - 1})
    if delta.out_scale is not None and delta.in_scale is not None:
        raise MergeRefused(f"{delta.module} is scaled on both sides, which is no sum; only one side adds up")
    vectors: dict[str, Tensor] = {}
    stored = base.bias(delta.module)
    stored = torch.zeros(shape[0]) if stored is None else stored
    if delta.out_scale is not None:
        vectors["out_gate"] = delta.out_scale.float().flatten() - 1
    if delta.in_scale is not None:
        vectors["in_gate"] = delta.in_scale.float().flatten() - 1
    after = stored if delta.new_bias is None else delta.new_bias.float()
    if delta.scales_bias and delta.out_scale is not None:
        after = after * delta.out_scale.float().flatten()
    if delta.bias is not None:
        after = after + delta.bias.float()
    if after is not stored:
        vectors["bias"] = after - stored
    return LinearUpdate(shape, vectors=vectors)


def _norm_change(delta: NormDelta, base: BaseWeights) -> dict[str, Tensor]:
    weight, bias = base.norm(delta.module)
    change: dict[str, Tensor] = {}
    if delta.gain is not None:
        change["gain"] = delta.gain.float() - (weight if delta.replaces else 0)
    if delta.shift is not None:
        change["shift"] = delta.shift.float() - (bias if delta.replaces and bias is not None else 0)
    return change
