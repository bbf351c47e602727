"""What the scheduler hands the model runner: the sequences of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class ScheduledPart(NamedTuple):
    """One part of a sequence's binding: the device ``slot`` of the adapter, its scales at the first and last layer, and
    the first position whose row it changes."""

    slot: int
    scale_first: float = 1.0
    scale_last: float = 1.0
    start_position: int = 0


@dataclass(slots=True)
class ScheduledSequence:
    """The tokens of one sequence that a step computes.

    ``token_ids`` are the tokens at positions ``start .. start + len(token_ids)``; ``block_table`` covers all positions
    up to there, and K and V of positions before ``start`` are already in it. ``logits``: "none", "last" (one row) or
    "all" (one row per token). ``length`` is the number of tokens of the sequence known by now (prompt and completion),
    which a prefill chunk cannot tell; 0 means ``start + len(token_ids)``. It picks the KV regime
    (``BaseModel.kv_regime``).
    """

    seq_id: int
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    parts: tuple[ScheduledPart, ...] = ()
    logits: Literal["none", "last", "all"] = "last"
    length: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def stop(self) -> int:
        """One past the last position computed."""
        return self.start + len(self.token_ids)
