"""The nouns that cross subsystem borders. Plain data: no torch, nothing of ours imported, every class pickles.

A *request* is what a client sent; it produces ``n`` *sequences*, the unit the engine schedules. A sequence carries a
*binding*: the ordered parts (adapter versions with their scales) whose deltas apply to its rows. The base alone is the
empty binding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a sequence ended. ``STOP``: end-of-sequence, a stop token or a stop string; ``LENGTH``: a token limit."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class AdapterState(StrEnum):
    """Where a version is in its life. Only ``adapters/residency.py`` moves a version from one state to another."""

    STORED = "stored"
    LOADING = "loading"
    HOST = "host"
    READY = "ready"
    FAILED = "failed"
    INCOMPATIBLE = "incompatible"
    RETIRED = "retired"


@dataclass(frozen=True, slots=True)
class BindingPart:
    """One adapter version inside a binding.

    Terms are stored at scale 1; the scale is data of the binding and runs linearly over depth from ``scale_first``
    (first decoder layer) to ``scale_last`` (last one). ``start_position`` is the first position whose row is adapted.
    ``num_prefix_tokens``: positions that the version puts before the sequence's own, as far as whoever binds it knows;
    it follows from the version and tells no two parts apart. So does ``num_token_ids``: the token ids of an adapter
    that adds tokens to the base's, else 0.
    """

    version: str
    scale_first: float = 1.0
    scale_last: float = 1.0
    start_position: int = 0
    num_prefix_tokens: int = field(default=0, compare=False)
    num_token_ids: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Binding:
    """Ordered adapter parts of a sequence; empty means the base model alone."""

    parts: tuple[BindingPart, ...] = ()

    @property
    def is_base(self) -> bool:
        return not self.parts

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(part.version for part in self.parts)

    @property
    def num_prefix_tokens(self) -> int:
        """Positions before the sequence's own; a part at strength 0 has none."""
        return sum(part.num_prefix_tokens for part in self.parts if part.scale_first or part.scale_last)

    @property
    def num_token_ids(self) -> int:
        """Token ids that its sequences may hold, where a part adds some to the base's; at strength 0 none does."""
        return max((part.num_token_ids for part in self.parts if part.scale_first and part.scale_last), default=0)


BASE_BINDING = Binding()


class Mix(StrEnum):
    """What the members of an ensemble are mixed by, see ``engine/mixing.py``."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"


@dataclass(frozen=True, slots=True)
class Member:
    """One model of an ensemble: the base with a binding, and how much it counts. ``weight``: finite and not 0; a mix of
    probabilities takes positive ones only."""

    binding: Binding
    weight: float


@dataclass(frozen=True, slots=True)
class Ensemble:
    """Models that answer as one: each member computes logits from the same tokens, one token is drawn from the mix, and
    every member goes on from it. A member costs a row of its own."""

    members: tuple[Member, ...]
    mix: Mix = Mix.LOGITS


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Ranges are checked by whoever builds one from user input (``api/``).

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 and ``min_p`` 0 are off. ``logprobs`` is the number of
    alternatives returned per completion token (0: only the chosen one; None: none); ``prompt_logprobs`` likewise for
    prompt tokens. ``max_tokens`` counts completion tokens.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt for the engine. Sequence ``index`` i of ``n`` samples with seed ``seed + i`` when a seed is given.

    ``cache_salt`` and ``tenant`` enter the prefix-cache key. ``eos_token_ids`` end a sequence unless ``ignore_eos``.
    ``deadline_seconds`` is the time from submission after which the request is aborted with an error. With
    ``is_streamed`` false nothing is told before the end: one output then has all. With an ``ensemble`` its members have
    the bindings, and ``binding`` is not looked at.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    binding: Binding = BASE_BINDING
    n: int = 1
    eos_token_ids: tuple[int, ...] = ()
    tenant: str = "default"
    cache_salt: str = ""
    deadline_seconds: float | None = None
    is_streamed: bool = True
    ensemble: Ensemble | None = None

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """One for each row that a choice costs."""
        return (self.binding,) if self.ensemble is None else tuple(member.binding for member in self.ensemble.members)

    @property
    def num_token_ids(self) -> int:
        """Token ids that all its rows know, where adapters add some to the base's."""
        return min((binding.num_token_ids for binding in self.bindings), default=0)

    @property
    def versions(self) -> tuple[str, ...]:
        """Of all bindings, each once, as they first occur."""
        return tuple(dict.fromkeys(version for binding in self.bindings for version in binding.versions))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural log, of the unmodified model distribution) of a token and its best alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class SequenceDelta(NamedTuple):
    """What one step added to one sequence of a request. ``token_ids`` may be empty when only the end is told.

    A named tuple, as ``RequestOutput`` is: there is one for each token, and a frozen dataclass takes three times as
    long to make.
    """

    index: int  # type: ignore[assignment]  # nobody looks for a value in one
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


class RequestOutput(NamedTuple):
    """What one step produced for one request: the message of the stream that ``AsyncEngine.submit`` returns.

    ``prompt_logprobs`` comes once, with the first output, when asked for: one entry per prompt token, the first None.
    ``num_cached_tokens`` is the number of prompt tokens served from the prefix cache. A failure that the client must
    hear of ends the stream by raising a ``DeltaserveError`` instead.
    """

    request_id: str
    deltas: tuple[SequenceDelta, ...]
    is_finished: bool = False
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Logits:
    """Probe result: ``data`` is row-major float32 ``[num_tokens, vocab_size]``, native byte order."""

    num_tokens: int
    vocab_size: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one engine step did; fed to metrics. Times in seconds of a monotonic clock."""

    step_seconds: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_running: int
    num_waiting: int
    num_distinct_adapters: int
    num_preempted: int
    num_blocks_used: int
    num_blocks_total: int
    oldest_wait_seconds: float


@dataclass(frozen=True, slots=True)
class RequestStats:
    """One finished request; fed to metrics. ``ttft_seconds``: arrival to first sampled token, None without one.

    Tokens of an ensemble are counted once, however many members compute them.
    """

    outcome: FinishReason
    versions: tuple[str, ...]
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    queue_seconds: float
    adapter_wait_seconds: float
    ttft_seconds: float | None
    itl_seconds: tuple[float, ...]
    e2e_seconds: float
    is_ensemble: bool = False


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """Residency of one version, for listings and metrics. ``reason`` explains FAILED and INCOMPATIBLE."""

    version: str
    state: AdapterState
    reason: str | None = None
    host_bytes: int = 0
    device_bytes: int = 0
    num_pins: int = 0
    last_used_seconds_ago: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for /health/ready, listings and metrics. ``error`` is set once the step loop has died."""

    is_alive: bool
    is_draining: bool
    num_running: int
    num_waiting: int
    num_blocks_used: int
    num_blocks_total: int
    adapters: tuple[AdapterStatus, ...] = ()
    error: str | None = None
