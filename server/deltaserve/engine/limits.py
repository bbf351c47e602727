"""What one engine can take, and the checks of a request against it, made before the request enters the engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from deltaserve.core import Binding, Ensemble, GenerationRequest, Mix, SamplingParams
from deltaserve.engine.member_errors import field_of, told_of_member
from deltaserve.errors import (
    CompositionRefused,
    ConfigError,
    ContextLengthExceeded,
    EnsembleRefused,
    InvalidRequest,
    Reason,
)

MAX_SCALE = 4096.0
"""As far as a proof goes to make an effect stand out. Far beyond it a sum of float32 overflows."""

MIN_REPETITION_PENALTY = 0.01
"""Logits are divided by it: near 0 they overflow."""

MAX_MEMBERS = 16
"""Of an ensemble: each takes a row of every step, and the prompt's logits of all of them are held at once."""

MAX_ROWS = 64
"""Of all choices of an ensemble: one request must not fill the queues."""

MAX_WEIGHT = 1000.0
"""Of a member: sums of logits stay far below what float32 holds."""

MIN_WEIGHT = 1e-6
"""Of a member of a mix of logits, above or below 0: with 1e-300 float32 has zeros, and no token is likelier than the
first one. Shares of probabilities may be as small as they like."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """``max_model_len``: prompt plus completion tokens of a sequence. ``max_num_seqs``: sequences running at once.
    ``max_num_batched_tokens``: the token budget of a step. ``max_queue``: requests not yet started.
    ``max_parts``: adapters in one binding, at most the number of slots.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_queue: int
    vocab_size: int
    max_parts: int = 8

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_queue", "vocab_size", "max_parts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.max_model_len < 2:
            raise ConfigError(f"max_model_len is {self.max_model_len}; it must be at least 2.")

    def check_blocks(self, num_blocks: int, block_size: int) -> None:
        """A sequence of the longest length must fit the KV cache alone. Raises ``ConfigError``."""
        if num_blocks * block_size < self.max_model_len:
            raise ConfigError(
                f"The KV cache holds {num_blocks * block_size} positions but max_model_len is {self.max_model_len}; "
                "raise --kv-cache-bytes or lower --max-model-len."
            )

    def check(self, request: GenerationRequest) -> None:
        """Raises ``ContextLengthExceeded`` or ``InvalidRequest``: nothing that could hurt a step gets past this."""
        sampling = request.sampling
        self.check_prompt(request.prompt_ids, request.num_token_ids)
        if sampling.max_tokens < 0:
            raise InvalidRequest(f"max_tokens is {sampling.max_tokens}; it must be at least 0.", param="max_tokens")
        for binding in request.bindings:
            self.check_length(len(request.prompt_ids), sampling.max_tokens, binding.num_prefix_tokens)
        if request.n < 1:
            raise InvalidRequest(f"n is {request.n}; it must be at least 1.", param="n")
        if request.n > self.max_queue:
            raise InvalidRequest(f"n is {request.n}; at most {self.max_queue} are allowed.", param="n")
        if request.ensemble is None:
            self.check_binding(request.binding)
        else:
            self._check_ensemble(request.ensemble, request.n)
        self._check_sampling(sampling, request.num_token_ids)

    def check_length(self, num_prompt_tokens: int, max_tokens: int, num_prefix_tokens: int = 0) -> None:
        """Prompt, answer and what an adapter puts before them must fit the context."""
        room = self.max_model_len - num_prefix_tokens
        num_tokens = num_prompt_tokens + max_tokens
        if num_tokens > room:
            taken = f", of which virtual tokens take {num_prefix_tokens}" if num_prefix_tokens else ""
            raise ContextLengthExceeded(
                f"The prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}: "
                f"{num_tokens} tokens in all, but the longest sequence is {self.max_model_len} tokens{taken}. "
                "Shorten the prompt or lower max_tokens.",
                param="max_tokens" if num_prompt_tokens < room else "prompt",
            )

    @property
    def max_members(self) -> int:
        """All rows of an ensemble run at once, and each has a token in every decode step."""
        return min(MAX_MEMBERS, self.max_num_seqs, self.max_num_batched_tokens)

    def check_slots(self, versions: Collection[str], num_slots: int) -> None:
        """The adapters of all members are on the device together."""
        if len(versions) > num_slots:
            raise EnsembleRefused(
                f"The members of the ensemble need {len(versions)} adapters at once; the device has {num_slots} slots.",
                param="ensemble.members",
            )

    def check_num_members(self, count: int) -> None:
        if not 1 <= count <= self.max_members:
            raise EnsembleRefused(
                f"The ensemble has {count} members; 1 to {self.max_members} are allowed, each a row of its own.",
                param="ensemble.members",
            )

    def check_num_parts(self, count: int) -> None:
        if count > self.max_parts:
            raise InvalidRequest(
                f"The request composes {count} adapters; at most {self.max_parts} are allowed.", param="adapters"
            )

    def check_rows(self, lengths: Iterable[int], num_blocks: int, block_size: int) -> None:
        """Rows of an ensemble, of ``lengths`` positions at their longest, must fit the KV cache together."""
        needed = sum(-(-length // block_size) for length in lengths)
        if needed > num_blocks:
            raise EnsembleRefused(
                f"The members of the ensemble need {needed} blocks of the KV cache at their longest, and it has "
                f"{num_blocks}; name fewer members, shorten the prompt or lower max_tokens.",
                param="ensemble.members",
            )

    def _check_ensemble(self, ensemble: Ensemble, num_choices: int) -> None:
        members = ensemble.members
        self.check_num_members(len(members))
        if num_choices * len(members) > MAX_ROWS:
            raise EnsembleRefused(
                f"{num_choices} choices of {len(members)} members are {num_choices * len(members)} rows; at most "
                f"{MAX_ROWS} are allowed.",
                param="n",
            )
        for index, member in enumerate(members):
            if ensemble.mix is Mix.PROBABILITIES:
                is_taken, allowed = 0 < member.weight <= MAX_WEIGHT, f"above 0 and at most {MAX_WEIGHT:g}"
            else:
                is_taken = MIN_WEIGHT <= abs(member.weight) <= MAX_WEIGHT
                allowed = f"from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, above or below 0"
            if not is_taken:
                raise InvalidRequest(
                    f"The weight of member {index} is {member.weight}; in a mix of {ensemble.mix.value} it must be "
                    f"{allowed}.",
                    param=f"{field_of(index)}.weight",
                )
            with told_of_member(index):
                self.check_binding(member.binding)

    def check_prompt(self, prompt_ids: tuple[int, ...], num_token_ids: int = 0) -> None:
        """``num_token_ids``: of adapters that add tokens to the base's."""
        if not prompt_ids:
            raise InvalidRequest("The prompt is empty; at least one token is needed.", param="prompt")
        if len(prompt_ids) > self.max_model_len:
            raise ContextLengthExceeded(
                f"The prompt has {len(prompt_ids)} tokens; the longest sequence is {self.max_model_len} tokens.",
                param="prompt",
            )
        self.check_ids(prompt_ids, "prompt", num_token_ids)

    def check_binding(self, binding: Binding) -> None:
        self.check_num_parts(len(binding.parts))
        if len(set(binding.versions)) < len(binding.parts):
            twice = next(v for v in binding.versions if binding.versions.count(v) > 1)
            raise InvalidRequest(
                f"The adapter version {twice[:12]} is composed twice; give it once, with the sum of the scales.",
                param="adapters",
            )
        for index, part in enumerate(binding.parts):
            for scale in (part.scale_first, part.scale_last):
                if not abs(scale) <= MAX_SCALE:
                    raise InvalidRequest(
                        f"The scale of adapters[{index}] is {scale:g}; it must be a number between -{MAX_SCALE:g} and "
                        f"{MAX_SCALE:g}.",
                        param=f"adapters[{index}].scale",
                    )
            if part.start_position < 0:
                raise InvalidRequest("An adapter's start position is negative.", param="adapters")
        self.check_prefixes(binding, [part.num_prefix_tokens for part in binding.parts])

    def check_prefixes(self, binding: Binding, lengths: Iterable[int]) -> None:
        """``lengths``: positions of each part's prefix. A prefix is there or not, and before the whole prompt."""
        for index, (part, length) in enumerate(zip(binding.parts, lengths, strict=True)):
            if not length:
                continue
            if part.scale_first != part.scale_last or part.scale_first not in (0.0, 1.0):
                ends = (part.scale_first, part.scale_last)
                strength = f"{ends[0]:g}" if ends[0] == ends[1] else f"[{ends[0]:g}, {ends[1]:g}]"
                where, found = f"adapters[{index}]", f"strength {strength} of the kind prefix"
                raise CompositionRefused(
                    f"The adapters cannot be composed: {where} has {found}; allowed: strength 0 or 1.",
                    param=f"{where}.scale",
                    reasons=[Reason("strength_not_linear", where, found, "strength 0 or 1")],
                )
            if part.start_position:
                raise InvalidRequest("An adapter with virtual tokens stands before the whole prompt.", param="adapters")

    def _check_sampling(self, sampling: SamplingParams, num_token_ids: int) -> None:
        allowed = (
            ("temperature", sampling.temperature >= 0, "at least 0"),
            ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
            ("top_k", sampling.top_k >= 0, "at least 0"),
            ("min_p", 0 <= sampling.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                sampling.repetition_penalty >= MIN_REPETITION_PENALTY,
                f"at least {MIN_REPETITION_PENALTY:g}",
            ),
            ("min_tokens", 0 <= sampling.min_tokens <= max(sampling.max_tokens, 0), "between 0 and max_tokens"),
            ("logprobs", sampling.logprobs is None or 0 <= sampling.logprobs <= self.vocab_size, "at least 0"),
            ("prompt_logprobs", (sampling.prompt_logprobs or 0) >= 0, "at least 0"),
        )
        for name, is_allowed, range_text in allowed:
            if not is_allowed:
                raise InvalidRequest(f"{name} is {getattr(sampling, name)}; it must be {range_text}.", param=name)
        numbers = ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty")
        for name in numbers:
            if not math.isfinite(getattr(sampling, name)):
                raise InvalidRequest(f"{name} is not a finite number.", param=name)
        if not all(math.isfinite(bias) for _, bias in sampling.logit_bias):
            raise InvalidRequest("A value of logit_bias is not a finite number.", param="logit_bias")
        self.check_ids([token_id for token_id, _ in sampling.logit_bias], "logit_bias", num_token_ids)
        self.check_ids(sampling.stop_token_ids, "stop_token_ids", num_token_ids)

    def check_ids(self, token_ids: Iterable[int], param: str, num_token_ids: int = 0) -> None:
        """Tokens of the base, and those that adapters add to them."""
        low, high = min(token_ids, default=0), max(token_ids, default=0)
        limit = max(self.vocab_size, num_token_ids)
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            raise InvalidRequest(
                f"Token id {wrong} in {param} is outside the vocabulary of {limit} tokens.", param=param
            )
