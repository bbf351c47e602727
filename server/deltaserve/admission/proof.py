"""The proof: the engine's answer with an adapter must equal the base with the adapter folded into its weights.

Two independent halves see the same probe tokens. The engine runs them like any request, at lowest priority, through
pages, pointer tables and operators. The other half runs the same model code with ``W + dW`` in float32, one linear at
a time, where ``dW`` comes from the file's own tensors and not from the folded form.

Tolerance on max |difference| of logits: float32 ``1e-4 * max(1, rms of the folded logits)``; bfloat16 and float16 four
times the distance of the base alone from its float32 self on the same tokens, and never below the float32 tolerance.
Where that does not hold, what rounding alone does with this very adapter is measured (``noise``).

An adapter whose effect hardly exceeds that would pass although it were not applied at all. It is compared a second time
at a scale that makes its effect stand out, where the error may be a third of the effect. The scale is data of a
binding; the terms are the ones that will be served. A prefix has one strength only: its effect cannot be amplified.

An adapter some of whose terms are the nearest of their rank (``conversion``) is compared with those terms, and these
with the method's own deltas, both folded: together that bounds how far serving is from the exact adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deltaserve.admission.conversion import (
    DEFAULT_ERROR_SHARE,
    Conversion,
    lossy_size,
    refusal,
    scale_for,
    told,
)
from deltaserve.admission.evidence import Comparison, Evidence, ProofKey
from deltaserve.admission.noise import other_precision, told_noise, with_noise
from deltaserve.core import BASE_BINDING, Binding, BindingPart, Logits
from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.modules import parallel_points, plain_modules
from deltaserve.deltas.prefixes import PlainPrefix, plain_prefix
from deltaserve.deltas.vectors import dense_biases, dense_norms
from deltaserve.deltas.vocabulary import row_changes, trained_tokens
from deltaserve.errors import Reason
from deltaserve.model.base import BaseModel
from deltaserve.model.prefix import prefixed_logits
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec

MAX_PROBE_TOKENS = 64
FLOAT32_TOLERANCE = 1e-4
NARROW_FACTOR = 4.0
CLEAR_EFFECT = 2.0
"""Times the tolerance: below that, leaving the adapter out altogether could pass as rounding."""
AMPLIFIED_EFFECT = 4.0
"""Times the tolerance: what amplifying aims at."""
AMPLIFIED_SHARE = 1 / 3
"""Of the amplified effect: the error allowed there. Far from its training scale an adapter amplifies rounding too."""
MAX_SCALE = 4096.0


class ProbeLimits(Protocol):
    @property
    def max_model_len(self) -> int: ...


class ProbeEngine(Protocol):
    """The part of ``AsyncEngine`` that a proof needs."""

    @property
    def limits(self) -> ProbeLimits: ...

    async def probe(self, ids: tuple[int, ...], binding: Binding) -> Logits: ...


@dataclass(frozen=True, slots=True)
class Judgement:
    """``reasons`` refuse; ``warnings`` are told and kept; ``waivers`` name what was accepted on the caller's word."""

    reasons: tuple[Reason, ...] = ()
    warnings: tuple[str, ...] = ()
    waivers: tuple[str, ...] = ()


def probe_ids(version: str, spec: BaseSpec, max_model_len: int, trained: Sequence[int] = ()) -> tuple[int, ...]:
    """Token ids drawn from the version's digest, so that the same bytes always meet the same tokens.

    They come from the range the tokenizer can produce (a checkpoint may pad its embedding beyond it); every second one
    from the tokens whose own rows the adapter has ``trained``, which chance would hardly meet. Tokens that it adds to
    the base's come last, so that the positions before can be compared with the base.
    """
    generator = random.Random(hashlib.sha256(f"probe {version}".encode()).digest())
    count = max(1, min(MAX_PROBE_TOKENS, max_model_len - 1))
    drawn = [generator.randrange(spec.num_tokens or spec.vocab_size) for _ in range(count)]
    known = [token for token in trained if token < spec.vocab_size]
    added = [token for token in trained if token >= spec.vocab_size]
    if known:
        drawn[::2] = [known[generator.randrange(len(known))] for _ in drawn[::2]]
    if added:
        last = range(count - max(1, count // 4), count)
        drawn[last.start :: 2] = [added[generator.randrange(len(added))] for _ in last[::2]]
    return tuple(drawn)


class Change(NamedTuple):
    """What folded mode does to the base, as ``BaseModel.folded_logits`` takes it, or what it puts before the tokens."""

    deltas: Mapping[str, Callable[[], Tensor]] = {}
    biases: Mapping[str, Callable[[], Tensor]] = {}
    norms: Mapping[str, tuple[Tensor | None, Tensor | None]] = {}
    modules: Mapping[str, Callable[[Tensor], Tensor]] = {}
    parallel: frozenset[str] = frozenset()
    rows: Mapping[str, Callable[[Tensor], Tensor]] = {}
    num_token_ids: int = 0
    prefix: PlainPrefix | None = None


class NonFiniteOutput(Exception):
    """Logits of one of the halves hold NaN or infinity; ``where`` says which."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.where = where


class Prover:
    """Measures one version at a time. ``in_worker(function)`` runs blocking work off the event loop: with a large
    vocabulary, looking at the logits of a probe takes a good part of a second.
    """

    def __init__(
        self,
        base: BaseModel,
        engine: ProbeEngine,
        key: ProofKey,
        in_worker: Callable[[Callable[[], Any]], Awaitable[Any]],
        error_share: float = DEFAULT_ERROR_SHARE,
    ) -> None:
        self._error_share = error_share
        self._base = base
        self._engine = engine
        self._key = key
        self._in_worker = in_worker

    async def measure(self, version: str, adapter: ParsedAdapter) -> Evidence:
        """The version must be registered with the engine as a candidate.

        Raises ``NonFiniteOutput``, or what the engine raises when the candidate cannot be run.
        """
        started = time.monotonic()
        trained = await self._in_worker(lambda: trained_tokens(adapter, self._base))
        room = self._engine.limits.max_model_len - adapter.num_prefix_tokens
        ids = probe_ids(version, self._base.spec, room, trained)
        base_ids = tuple(itertools.takewhile(lambda token: token < self._base.vocab_size, ids))
        folded_base = await self._folded(base_ids, Change(), "the base's own logits")
        base_error = None
        if self._base.dtype != torch.float32:
            served_base = await self._probe(base_ids, BASE_BINDING, "the engine's logits of the base")
            base_error = await self._in_worker(lambda: _distance(served_base, folded_base))
        plain = await self._compare(version, adapter, ids, 1.0, folded_base, base_error)
        amplified = None
        if adapter.prefix is None and (scale := _amplification(plain)) > 1.0:
            with contextlib.suppress(NonFiniteOutput):  # as it is served it was finite: this scale is too much for it
                amplified = await self._compare(version, adapter, ids, scale, folded_base, base_error)
        conversion = None
        if adapter.lossy_deltas:
            conversion = await self._conversion(adapter, ids, folded_base)
        return Evidence(
            version=version,
            base_fingerprint=self._key.base_fingerprint,
            dtype=self._key.dtype,
            device=self._key.device,
            operators=self._key.operators,
            fold_version=self._key.fold_version,
            num_tokens=len(ids),
            plain=plain,
            amplified=amplified,
            base_error=base_error,
            seconds=time.monotonic() - started,
            conversion=conversion,
        )

    async def _conversion(self, adapter: ParsedAdapter, ids: tuple[int, ...], folded_base: Tensor) -> Conversion:
        noise = FLOAT32_TOLERANCE * max(1.0, await self._in_worker(lambda: _rms(folded_base)))
        where = "the exact deltas' logits"
        exact = await self._folded(ids, self._change(adapter, 1.0, as_served=False), where)
        effect = await self._in_worker(lambda: _effect(exact, folded_base))
        scale = scale_for(effect, self._error_share, noise, MAX_SCALE)
        if scale != 1.0:
            exact = await self._folded(ids, self._change(adapter, scale, as_served=False), where)
            effect = await self._in_worker(lambda: _effect(exact, folded_base))
        kept = await self._folded(ids, self._change(adapter, scale, as_served=True), "the converted terms' logits")
        error = await self._in_worker(lambda: _distance(exact, kept))
        rank, num_linears = lossy_size(adapter)
        return Conversion(scale, error, effect, self._error_share * effect, rank, num_linears)

    def _change(self, adapter: ParsedAdapter, scale: float, *, as_served: bool) -> Change:
        """Biases, norms and what modules add are linear in the strength; so are weights, unless both sides change."""
        return Change(
            dense_deltas(adapter, self._base.spec, self._base, scale, as_served=as_served),
            {name: partial(_scaled, make, scale) for name, make in dense_biases(adapter, self._base).items()},
            {name: (_times(w, scale), _times(b, scale)) for name, (w, b) in dense_norms(adapter, self._base).items()},
            {name: partial(_added, module, scale) for name, module in plain_modules(adapter).items()},
            parallel_points(adapter),
            {
                name: partial(_scaled_rows, change, scale)
                for name, change in row_changes(adapter, self._base.spec, self._base).items()
            },
            adapter.num_token_ids,
            plain_prefix(adapter.prefix, self._base.spec) if adapter.prefix is not None else None,
        )

    async def _compare(
        self,
        version: str,
        adapter: ParsedAdapter,
        ids: tuple[int, ...],
        scale: float,
        folded_base: Tensor,
        base_error: float | None,
    ) -> Comparison:
        part = BindingPart(
            version, scale, scale, num_prefix_tokens=adapter.num_prefix_tokens, num_token_ids=adapter.num_token_ids
        )
        change = self._change(adapter, scale, as_served=True)
        served = await self._probe(ids, Binding((part,)), "the engine's logits with the adapter")
        folded = await self._folded(ids, change, "the folded weights' logits")

        def compare() -> Comparison:
            effect, rms = _effect(folded, folded_base), _rms(folded)
            tolerance = max(FLOAT32_TOLERANCE * max(1.0, rms), NARROW_FACTOR * (base_error or 0.0))
            if scale != 1.0:
                tolerance = max(tolerance, AMPLIFIED_SHARE * effect)
            return Comparison(
                scale=scale,
                effect=effect,
                max_error=_distance(served, folded),
                tolerance=tolerance,
                logits_rms=rms,
                greedy_agreement=float((served.argmax(-1) == folded.argmax(-1)).float().mean()),
            )

        comparison: Comparison = await self._in_worker(compare)
        if scale != 1.0 or comparison.is_within_tolerance:
            return comparison
        with contextlib.suppress(NonFiniteOutput):  # beyond the range of 16 bits where nothing served is: no measure
            again = await self._folded(ids, change, "the folded weights' logits", other_precision(self._base.dtype))
            comparison = await self._in_worker(lambda: with_noise(comparison, _distance(again, folded)))
        return comparison

    async def _probe(self, ids: tuple[int, ...], binding: Binding, where: str) -> Tensor:
        logits = await self._engine.probe(ids, binding)
        return await self._in_worker(lambda: _finite(_rows(logits), where))

    async def _folded(
        self, ids: tuple[int, ...], change: Change, where: str, precision: torch.dtype | None = None
    ) -> Tensor:
        tokens = torch.tensor(ids, dtype=torch.int64)
        return await self._in_worker(lambda: _finite(_folded_logits(self._base, tokens, change, precision), where))


def _folded_logits(base: BaseModel, tokens: Tensor, change: Change, precision: torch.dtype | None) -> Tensor:
    if change.prefix is None:
        return base.folded_logits(tokens, *change[:-1], precision=precision).cpu()
    given, kept = change.prefix.embeddings, change.prefix.keys_values  # such adapters change nothing else
    return prefixed_logits(base, tokens, embeddings=given, keys_values=kept, precision=precision).cpu()


def judge(evidence: Evidence, *, accept_no_effect: bool) -> Judgement:
    """What the evidence means for the version."""
    conversion = evidence.conversion
    if conversion is not None and (reason := refusal(conversion)):
        return Judgement(reasons=(reason,))
    converted = () if conversion is None else (told(conversion),)
    for comparison in evidence.comparisons:
        if not comparison.is_within_tolerance:
            at = "" if comparison.scale == 1.0 else f" at scale {comparison.scale:g}"
            found = f"served logits differ from folded weights by {comparison.max_error:.3g}{at}"
            noise = "" if comparison.noise is None else f", of which rounding alone makes {comparison.noise:.3g}"
            allowed = f"at most {comparison.tolerance:.3g} ({evidence.dtype}, {evidence.num_tokens} tokens{noise})"
            return Judgement(reasons=(Reason("proof_failed", "logits", found, allowed),))
    if evidence.plain.noise is not None:
        converted = (*converted, told_noise(evidence.plain, evidence.dtype))
    if evidence.effect == 0.0:
        if not accept_no_effect:
            allowed = "an adapter that changes the base's logits, or accept_no_effect=true"
            return Judgement(reasons=(Reason("no_effect", "logits", "no logit changes at all", allowed),))
        return Judgement(warnings=(*converted, "the adapter changes nothing"), waivers=("no_effect",))
    if evidence.effect <= evidence.tolerance:
        weak = f"the effect {evidence.effect:.3g} is below the noise of {evidence.dtype} ({evidence.tolerance:.3g})"
        return Judgement(warnings=(*converted, weak))
    return Judgement(warnings=converted)


def _amplification(plain: Comparison) -> float:
    """The power of two that lifts the effect to ``AMPLIFIED_EFFECT`` tolerances; 1 where it is clear (or nothing)."""
    if plain.effect == 0.0 or not plain.is_within_tolerance or plain.effect >= CLEAR_EFFECT * plain.tolerance:
        return 1.0
    return min(MAX_SCALE, 2.0 ** math.ceil(math.log2(AMPLIFIED_EFFECT * plain.tolerance / plain.effect)))


def _rows(logits: Logits) -> Tensor:
    flat = torch.frombuffer(bytearray(logits.data), dtype=torch.float32)
    return flat.view(logits.num_tokens, logits.vocab_size)


def _scaled(make: Callable[[], Tensor], scale: float) -> Tensor:
    return make().mul_(scale)


def _added(module: torch.nn.Module, scale: float, hidden: Tensor) -> Tensor:
    added: Tensor = module.to(hidden.device)(hidden)
    return added * scale


def _scaled_rows(change: Callable[[Tensor], Tensor], scale: float, ids: Tensor) -> Tensor:
    return change(ids).mul_(scale)


def _times(tensor: Tensor | None, scale: float) -> Tensor | None:
    return None if tensor is None else tensor * scale


def _finite(logits: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteOutput(where)
    return logits


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _effect(changed: Tensor, base: Tensor) -> float:
    """The largest difference where the base has logits: not of tokens that the adapter adds, nor after one."""
    return _distance(changed[: len(base), : base.shape[1]], base)


def _rms(logits: Tensor) -> float:
    return math.sqrt(float(logits.double().square().mean()))
