"""What the scheduler hands the model runner: the sequences of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from deltaserve.model.kv_cache import BLOCK_SIZE


class ScheduledPart(NamedTuple):
    """One part of a sequence's binding: the device ``slot`` of the adapter, its scales at the first and last layer, and
    the first position whose row it changes."""

    slot: int
    scale_first: float = 1.0
    scale_last: float = 1.0
    start_position: int = 0


class PrefixPart(NamedTuple):
    """The virtual tokens of the adapter in ``slot``, ``num_tokens`` positions from ``start`` on. ``is_run``: K and V
    are computed from their embeddings by the sequence's parts, and read what stands before; else the adapter has them
    ready."""

    slot: int
    start: int
    num_tokens: int
    is_run: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


class PrefixFill(NamedTuple):
    """Before the step, the prefixes of a sequence are written to its blocks from ``first_block`` on."""

    parts: tuple[PrefixPart, ...]
    first_block: int = 0
    regime: int = 0

    @property
    def num_rows(self) -> int:
        """Virtual tokens that the model has to be run over."""
        begin = self.first_block * BLOCK_SIZE
        return sum(max(0, part.stop - max(begin, part.start)) for part in self.parts if part.is_run)


@dataclass(slots=True)
class ScheduledSequence:
    """The tokens of one sequence that a step computes.

    ``token_ids`` are the tokens at positions ``start .. start + len(token_ids)``; ``block_table`` covers all positions
    up to there, and K and V of positions before ``start`` are already in it, or will be by ``prefix``. ``logits``:
    "none", "last" (one row) or "all" (one row per token). ``length`` is the number of positions of the sequence known
    by now (prompt, completion, and what stands before them), which a prefill chunk cannot tell; 0 means ``start +
    len(token_ids)``. It picks the KV regime (``BaseModel.kv_regime``).
    """

    seq_id: int
    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    parts: tuple[ScheduledPart, ...] = ()
    logits: Literal["none", "last", "all"] = "last"
    length: int = 0
    prefix: PrefixFill | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def stop(self) -> int:
        """One past the last position computed."""
        return self.start + len(self.token_ids)


def check_batch(batch: Sequence[ScheduledSequence], sizes: Any, starts: Any, max_context: int) -> None:
    """Raise ValueError when a sequence is empty, leaves the context or its block table; ``sizes`` and ``starts`` are
    numpy int64 [S], the numbers of tokens and first positions."""
    if not len(batch) or sizes.min() < 1:
        raise ValueError("a step needs at least one sequence, and each at least one token")
    if starts.min() < 0 or (starts + sizes).max() > max_context:
        raise ValueError(f"positions {starts.min()}..{(starts + sizes).max()} leave 0..{max_context}")
    for seq in batch:
        if len(seq.block_table) * BLOCK_SIZE < seq.stop:
            raise ValueError(
                f"sequence {seq.seq_id} has {len(seq.block_table)} blocks for {seq.stop} positions; "
                f"a block holds {BLOCK_SIZE}"
            )
