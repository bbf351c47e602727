"""The methods: updates in, one update out.

Soup, linear, LiNeS, EMA and Model Stock are weighted sums; they never form a matrix and are exact up to the rounding of
the stored numbers. TIES, DARE and NegMerge look at every number: one weight matrix at a time is formed in float32, and
the result leaves as sparse entries (exact) or as the nearest low-rank matrix (the error is measured and told).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from deltaserve_store.spec import BaseSpec
from deltaserve_trainer.errors import MergeRefused
from deltaserve_trainer.merging import elementwise, low_rank
from deltaserve_trainer.merging.low_rank import Factors
from deltaserve_trainer.merging.model_stock import pull, stock_ratio
from deltaserve_trainer.merging.options import ELEMENTWISE, MergeOptions
from deltaserve_trainer.merging.update import (
    BaseWeights,
    LinearUpdate,
    Update,
    add_linears,
    add_vectors,
    entries_of,
)

DEFAULT_DENSITY = 0.2
DEFAULT_MOMENTUM = 0.9
_FIRST_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
Several = Sequence[Tensor]
Weigh = Callable[[int, str], float]
"""Weight of the i-th adapter at a module."""


@dataclass(frozen=True, slots=True)
class Merged:
    """``errors``: relative Frobenius error of what a linear's result lost, by module; empty for exact methods.
    ``ratios``: Model Stock's, by module."""

    update: Update
    errors: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)


def merge(updates: Sequence[Update], options: MergeOptions, spec: BaseSpec, base: BaseWeights) -> Merged:
    """Merge by any method but greedy soup, which needs scores (``soup``). Raises ``MergeRefused``."""
    options.check_count(len(updates))
    if options.method in ELEMENTWISE:
        return _merge_elementwise(updates, options, base)
    if options.method == "model-stock":
        return _model_stock(updates, base)
    return Merged(weighted_sum(updates, _weights(options, len(updates), spec)))


def _first_with(updates: Sequence[Update], linear: str, vector: str) -> int:
    """Its place in the list, from 1, as a reader counts."""
    return next(i for i, u in enumerate(updates, 1) if linear in u.linears and vector in u.linears[linear].vectors)


def weighted_sum(updates: Sequence[Update], weigh: Weigh) -> Update:
    """``sum_i weigh(i, module) * update_i``; refuses scales on both sides of one linear, which have no such sum."""
    linears: dict[str, LinearUpdate] = {}
    for name in _names(updates, "linears"):
        total = add_linears([(weigh(i, name), u.linears[name]) for i, u in enumerate(updates) if name in u.linears])
        if {"out_gate", "in_gate"} <= set(total.vectors):
            scaled = [_first_with(updates, name, vector) for vector in ("in_gate", "out_gate")]
            raise MergeRefused(
                f"{name}: adapter {scaled[0]} of the list scales its input and adapter {scaled[1]} its output; the sum "
                "is no pair of scales. Merge them with ties or dare, which form the matrix, or leave one out"
            )
        linears[name] = total
    norms = {
        name: add_vectors([(weigh(i, name), u.norms[name]) for i, u in enumerate(updates) if name in u.norms])
        for name in _names(updates, "norms")
    }
    return Update(linears, norms)


def depth_profile(module: str, num_layers: int, alpha: float, beta: float) -> float:
    """LiNeS (Wang et al., arXiv:2410.17146): ``alpha + beta * (l - 1) / (L - 1)`` for layer l of L, counted from 1.
    What lies behind the layers (a last norm) counts as the last one."""
    found = _FIRST_NUMBER.search(module)
    layer = int(found.group(1)) if found else num_layers - 1
    return alpha + beta * layer / max(1, num_layers - 1)


def moving_average(count: int, momentum: float) -> tuple[float, ...]:
    """Weights of ``slow := momentum * slow + (1 - momentum) * fast`` over checkpoints, oldest (the start) first."""
    newer = [(1 - momentum) * momentum ** (count - 1 - i) for i in range(1, count)]
    return (momentum ** (count - 1), *newer)


def _weights(options: MergeOptions, count: int, spec: BaseSpec) -> Weigh:
    if options.method == "soup":
        return lambda i, module: 1 / count
    if options.method == "ema":
        momentum = DEFAULT_MOMENTUM if options.momentum is None else options.momentum
        averages = moving_average(count, momentum)
        return lambda i, module: averages[i]
    weights = options.weights_for(count)
    if options.method == "linear":
        return lambda i, module: weights[i]
    alpha = 0.0 if options.alpha is None else options.alpha
    beta = 1.0 if options.beta is None else options.beta
    return lambda i, module: weights[i] * depth_profile(module, spec.num_layers, alpha, beta)


def _model_stock(updates: Sequence[Update], base: BaseWeights) -> Merged:
    """Each weight and each vector for itself; see ``model_stock``."""
    count = len(updates)
    ratios: dict[str, float] = {}
    linears: dict[str, LinearUpdate] = {}
    for name in _names(updates, "linears"):
        parts = [u.linears[name] for u in updates if name in u.linears]
        ratio = stock_ratio(parts, count, partial(base.weight, name))
        if any(part.has_matrix for part in parts):
            ratios[name] = ratio
        shrunk = [(ratio / count, LinearUpdate(p.shape, p.factors, p.entries, _without_bias(p.vectors))) for p in parts]
        biases = pull([part.vectors for part in parts], count, only="bias")
        total = add_linears([*shrunk, (1.0, LinearUpdate(parts[0].shape, vectors=biases))])
        if {"out_gate", "in_gate"} <= set(total.vectors):
            raise MergeRefused(f"{name}: scales on both sides have no sum; leave one of the adapters out")
        linears[name] = total
    norms = {
        name: pull([u.norms[name] for u in updates if name in u.norms], count) for name in _names(updates, "norms")
    }
    return Merged(Update(linears, norms), ratios=ratios)


def _without_bias(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: vector for name, vector in vectors.items() if name != "bias"}


def _merge_elementwise(updates: Sequence[Update], options: MergeOptions, base: BaseWeights) -> Merged:
    is_sparse = _becomes_sparse(updates, options)
    linears: dict[str, LinearUpdate] = {}
    errors: dict[str, float] = {}
    for name in _names(updates, "linears"):
        parts = [u.linears.get(name) for u in updates]
        shape = next(part.shape for part in parts if part is not None)
        vectors = _merge_vectors(name, [{} if p is None else p.vectors for p in parts], ("bias",), options)
        if not any(part is not None and part.has_matrix for part in parts):
            linears[name] = LinearUpdate(shape, vectors=vectors)
            continue
        weight = partial(base.weight, name)
        dense = [torch.zeros(shape) if part is None else part.dense(weight) for part in parts]
        result = _apply(name, dense, options)
        if is_sparse:
            entries = entries_of(result)
            linears[name] = LinearUpdate(shape, entries=entries if len(entries.keys) else None, vectors=vectors)
            continue
        size = float(torch.linalg.matrix_norm(result.double()))
        if size == 0:
            linears[name] = LinearUpdate(shape, vectors=vectors)
            continue
        factors = low_rank.nearest(result, _rank(parts, shape, options))
        errors[name] = float(torch.linalg.matrix_norm(result.double() - factors.b.double() @ factors.a.double())) / size
        linears[name] = LinearUpdate(shape, factors=factors, vectors=vectors)
    norms = {
        name: _merge_vectors(name, [u.norms.get(name, {}) for u in updates], ("gain", "shift"), options)
        for name in _names(updates, "norms")
    }
    return Merged(Update(linears, norms), errors=errors)


def _becomes_sparse(updates: Sequence[Update], options: MergeOptions) -> bool:
    if options.form in ("lora", "sparse"):
        return options.form == "sparse"
    changes = [change for update in updates for change in update.linears.values()]
    return not any(change.factors is not None or change.has_gate for change in changes)


def _rank(parts: Sequence[LinearUpdate | None], shape: tuple[int, int], options: MergeOptions) -> int:
    """What was asked for, else the sum of the ranks that came in."""
    if options.rank is not None:
        return min(options.rank, *shape)
    ranks = [part.factors.rank for part in parts if part is not None and part.factors is not None]
    if not ranks:
        raise MergeRefused("the result has no natural rank: give --rank, or --form sparse")
    return min(sum(ranks), *shape, 1024)


def _merge_vectors(
    module: str, parts: Sequence[Mapping[str, Tensor]], kinds: Sequence[str], options: MergeOptions
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind in kinds:
        given = [part[kind] for part in parts if kind in part]
        if given:
            vectors = [part.get(kind, torch.zeros_like(given[0])) for part in parts]
            found[kind] = _apply(f"{module}.{kind}", vectors, options)
    return found


def _apply(name: str, deltas: Several, options: MergeOptions) -> Tensor:
    density = DEFAULT_DENSITY if options.density is None else options.density
    if options.method == "negmerge":
        return elementwise.negmerge(deltas, 1.0 if options.scale is None else options.scale)
    weights = options.weights_for(len(deltas))
    if options.method == "ties":
        return elementwise.ties(deltas, weights, density)
    generators = [seeded(options.seed or 0, f"{index}:{name}") for index in range(len(deltas))]
    return elementwise.dare(deltas, weights, density, generators)


def seeded(seed: int, name: str) -> torch.Generator:
    """A stream of its own for every tensor, so that no draw depends on which other tensors there are."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _names(updates: Sequence[Update], part: str) -> list[str]:
    return list(dict.fromkeys(name for update in updates for name in getattr(update, part)))


def compressed(update: Update, rank: int | None, dtype: torch.dtype) -> tuple[Update, dict[str, float]]:
    """Low-rank parts of at most ``rank`` (None: of at most their matrix's own), in ``dtype``; the relative error of
    each part that is not stored as it was. Raises ``MergeRefused`` above rank 1024."""
    linears: dict[str, LinearUpdate] = {}
    errors: dict[str, float] = {}
    for name, change in update.linears.items():
        factors, entries = change.factors, change.entries
        if factors is not None and low_rank.is_nothing(factors):
            factors = None  # a sum that cancels: its factors are not zero, their product is
        if factors is not None:
            stored = _fitted(name, factors, rank, dtype)
            if stored is not factors:
                errors[name] = low_rank.relative_error(stored, factors)
            factors = stored
        if entries is not None and dtype != torch.float32:
            rounded = entries.values.to(dtype)
            size = float(entries.values.norm())
            error = float((rounded.float() - entries.values).norm()) / size if size else 0.0
            errors[name] = max(errors.get(name, 0.0), error)
            entries = type(entries)(entries.keys, rounded)
        linears[name] = LinearUpdate(change.shape, factors, entries, change.vectors)
    return Update(linears, update.norms), errors


def _fitted(name: str, factors: Factors, rank: int | None, dtype: torch.dtype) -> Factors:
    most = factors.max_rank if rank is None else min(rank, factors.max_rank)
    if factors.rank > most:
        factors = low_rank.truncated(factors, most)
    if factors.rank > 1024:
        raise MergeRefused(f"{name}: the sum has rank {factors.rank}, at most 1024 is served; give --rank")
    return factors if dtype == torch.float32 else Factors(factors.a.to(dtype), factors.b.to(dtype))
