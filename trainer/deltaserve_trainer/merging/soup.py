"""Greedy soup (Wortsman et al., arXiv:2203.05482): add an ingredient where it does not hurt on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaserve_trainer.merging.merge import weighted_sum
from deltaserve_trainer.merging.update import Update

Score = Callable[[Update], float]
"""Mean loss on held-out data, lower is better."""


@dataclass(frozen=True, slots=True)
class Soup:
    """``order``: all ingredients, best first; ``losses`` theirs, by number as given. ``chosen``: those in the soup."""

    update: Update
    chosen: tuple[int, ...]
    order: tuple[int, ...]
    losses: tuple[float, ...]
    loss: float


def greedy_soup(updates: Sequence[Update], score: Score) -> Soup:
    """Best first; an ingredient stays where the mean with it is no worse than without. So the soup is never worse on
    these data than its best ingredient."""
    losses = [score(update) for update in updates]
    order = sorted(range(len(updates)), key=lambda i: (losses[i], i))
    chosen, best, soup = [order[0]], losses[order[0]], updates[order[0]]
    for candidate in order[1:]:
        mixed = mean_of([updates[i] for i in (*chosen, candidate)])
        loss = score(mixed)
        if loss <= best:
            chosen.append(candidate)
            best, soup = loss, mixed
    return Soup(soup, tuple(sorted(chosen)), tuple(order), tuple(losses), best)


def mean_of(updates: Sequence[Update]) -> Update:
    """Uniform soup."""
    return weighted_sum(updates, lambda i, module: 1 / len(updates))
