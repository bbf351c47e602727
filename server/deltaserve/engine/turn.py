"""Whose turn it is when adapters outnumber the slots.

Sequences whose adapter has a slot are served at once, so an adapter that always has new work could keep its slot for
ever. Once the oldest sequence that lacks room has waited long enough, it becomes the *claimant*: the adapters whose
running work ends soonest are drained for it, which means that no younger sequence may start on them, or take a slot
that comes free. Running sequences are never touched, so the wait ends when theirs do.
"""

from __future__ import annotations

from collections.abc import Iterable

from deltaserve.adapters.residency import AdapterResidency
from deltaserve.engine.sequence import Sequence


class Turn:
    """``patience_seconds``: how long a sequence is passed over for want of a slot before it becomes the claimant."""

    def __init__(self, residency: AdapterResidency, patience_seconds: float) -> None:
        self._residency = residency
        self._patience_seconds = patience_seconds
        self._claimant: Sequence | None = None
        self._drained: frozenset[str] = frozenset()

    def begin_step(self, waiting: Iterable[Sequence], running: Iterable[Sequence], now: float) -> None:
        """Find the claimant among ``waiting`` (oldest first) and what must be drained for it."""
        self._claimant = None
        remaining: dict[str, int] | None = None
        for seq in waiting:
            since = seq.adapter_blocked_since
            if since is None or now - since < self._patience_seconds:
                continue
            remaining = self._remaining(running) if remaining is None else remaining
            drained = self._residency.must_drain(seq.needed_versions, remaining)
            if drained is not None:
                self._claimant, self._drained = seq, drained
                return

    def holds_back(self, seq: Sequence) -> bool:
        """Whether this sequence must wait so that the claimant's turn comes. Base-only sequences never must."""
        claimant = self._claimant
        if claimant is None or seq.priority <= claimant.priority:
            return False
        versions = seq.needed_versions
        return any(version in self._drained or not self._residency.is_pinned(version) for version in versions)

    def end(self, seq: Sequence) -> None:
        """The sequence got its adapters; if it was the claimant, nobody is held back any more."""
        if seq is self._claimant:
            self._claimant = None

    @staticmethod
    def _remaining(running: Iterable[Sequence]) -> dict[str, int]:
        """Most tokens that running work can still take, by version."""
        remaining: dict[str, int] = {}
        for seq in running:
            for version in seq.versions:
                remaining[version] = max(remaining.get(version, 0), seq.max_remaining_tokens)
        return remaining
