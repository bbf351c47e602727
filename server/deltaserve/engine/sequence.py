"""One sequence as the engine schedules it. Mutable, and owned by the engine thread alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum

from deltaserve.core import Binding, FinishReason, SamplingParams
from deltaserve.engine.batch import PrefixPart, ScheduledPart
from deltaserve.engine.lockstep import Lockstep
from deltaserve.engine.token_counts import TokenCounts


class SequenceState(StrEnum):
    """WAITING for a seat (new, or preempted); RUNNING holds blocks and pins; FINISHED holds nothing."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and completion tokens, and how far they are computed.

    ``token_ids[:num_computed_tokens]`` have their K and V in ``block_table``; the rest is computed next. While
    decoding exactly the last token is uncomputed. Token i stands at position ``num_prefix_tokens`` + i: before come the
    virtual tokens of ``prefixes``; from block ``first_prefix_block`` on their K and V are still to be filled in (-1:
    all are there). ``priority`` orders sequences: lower is served first, and it never changes, so whoever waits longest
    comes first. ``leader`` is the sibling whose prefill this one waits to share.
    ``lockstep`` joins it to the other rows of an ensemble.
    """

    seq_id: int
    request_id: str
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    binding: Binding
    versions: tuple[str, ...]
    priority: tuple[float, int]
    arrival_seconds: float
    stop_token_ids: frozenset[int]
    tenant: str = "default"
    cache_salt: str = ""
    is_probe: bool = False
    leader: Sequence | None = None
    lockstep: Lockstep | None = None

    state: SequenceState = SequenceState.WAITING
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_committed_blocks: int = 0
    cache_context: bytes | None = None
    kv_regime: int = 0
    parts: tuple[ScheduledPart, ...] = ()
    num_prefix_tokens: int = 0
    prefixes: tuple[PrefixPart, ...] = ()
    first_prefix_block: int = -1
    has_prompt_rows: bool = False  # the rows for prompt logprobs (or a probe) have all been collected
    rng: random.Random = field(default_factory=random.Random)
    counts: TokenCounts | None = None
    finish_reason: FinishReason | None = None

    started_seconds: float | None = None
    last_token_seconds: float | None = None
    adapter_blocked_since: float | None = None
    adapter_wait_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_positions(self) -> int:
        """The prefix and all tokens."""
        return self.num_prefix_tokens + len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """One token away from the next sample, with at least one sampled already. Of an ensemble the leading row tells
        whether all are, the first sample included: rows wait for each other at their prompt's last token."""
        if self.lockstep is not None:
            return self.leads and self.lockstep.is_level
        num_tokens = len(self.token_ids)
        return num_tokens - self.num_computed_tokens == 1 and num_tokens > self.num_prompt_tokens

    @property
    def rows(self) -> tuple[Sequence, ...]:
        """This one, or all that are in lock-step with it."""
        return (self,) if self.lockstep is None else self.lockstep.rows

    @property
    def leads(self) -> bool:
        return self.lockstep is None or self.lockstep.rows[0] is self

    @property
    def needed_versions(self) -> tuple[str, ...]:
        """Of all ``rows``: what must be on the device before they start."""
        return self.versions if self.lockstep is None else self.lockstep.versions

    @property
    def wants_all_rows(self) -> bool:
        """Logits of every prompt position are still to be collected (probe, or prompt logprobs)."""
        return not self.has_prompt_rows and (self.is_probe or self.sampling.prompt_logprobs is not None)

    @property
    def max_remaining_tokens(self) -> int:
        """Most tokens it may still sample: how long its pins can last."""
        return max(0, self.sampling.max_tokens - self.num_completion_tokens) + self.num_uncomputed_tokens

    @property
    def is_ready_to_share(self) -> bool:
        """No leader, or the leader's prompt is computed (or will never be)."""
        leader = self.leader
        return (
            leader is None
            or leader.num_computed_tokens >= leader.num_prompt_tokens
            or leader.num_completion_tokens > 0
            or leader.state is SequenceState.FINISHED
        )
