"""What is asked, when: an open-loop plan made from a seed before the first request is sent.

Open loop: arrivals do not wait for answers, so a slow server meets a growing queue instead of a politer client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOPICS = ("a fox", "the old bridge", "a baker", "the harbour", "a kite", "two sisters", "the rain", "a clockmaker")
OPENINGS = (
    "Tell me a short story about {topic}.",
    "What would you say about {topic}?",
    "Describe {topic} in a few words.",
    "Give me one piece of advice about {topic}.",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Parameters of a plan. ``rate`` is requests per second; ``base_share`` the share of requests to the base alone.

    ``popularity`` is ``uniform`` or ``zipf``; under ``zipf`` the k-th adapter (from 1) has weight ``k ** -zipf_s``.
    """

    rate: float
    seconds: float
    seed: int = 0
    popularity: str = "uniform"
    zipf_s: float = 0.9
    base_share: float = 0.1
    num_prompts: int = 16
    max_tokens: int = 32

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.seconds <= 0:
            raise ValueError(f"rate ({self.rate}) and seconds ({self.seconds}) must be greater than 0")
        if self.popularity not in ("uniform", "zipf"):
            raise ValueError(f"popularity is {self.popularity!r}; it must be uniform or zipf")
        if not 0 <= self.base_share <= 1:
            raise ValueError(f"base_share is {self.base_share}; it must be between 0 and 1")
        if self.num_prompts < 1 or self.max_tokens < 1:
            raise ValueError("num_prompts and max_tokens must be at least 1")


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request: ``at_seconds`` after the start, to ``model``, greedy."""

    index: int
    at_seconds: float
    model: str
    prompt: str
    max_tokens: int


def popularity(workload: Workload, num_adapters: int) -> np.ndarray:
    """Probability of each adapter, float64 ``[num_adapters]``, given that an adapter is asked."""
    if workload.popularity == "uniform":
        weights = np.ones(num_adapters)
    else:
        weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -workload.zipf_s
    return weights / weights.sum()


def prompts(count: int) -> list[str]:
    """``count`` distinct prompts; few enough that the same question meets the same adapter more than once."""
    made = [opening.format(topic=topic) for topic in TOPICS for opening in OPENINGS]
    made += [f"{made[i % len(made)]} (No. {i})" for i in range(count - len(made))]
    return made[:count]


def plan(workload: Workload, base: str, adapters: Sequence[str]) -> list[PlannedRequest]:
    """Poisson arrivals of ``rate`` for ``seconds``. The same arguments give the same plan."""
    random = np.random.default_rng(workload.seed)
    questions = prompts(workload.num_prompts)
    pmf = popularity(workload, len(adapters)) if adapters else None
    planned: list[PlannedRequest] = []
    at = float(random.exponential(1 / workload.rate))
    while at < workload.seconds:
        to_base = pmf is None or random.random() < workload.base_share
        model = base if to_base else adapters[int(random.choice(len(adapters), p=pmf))]
        question = questions[int(random.integers(len(questions)))]
        planned.append(PlannedRequest(len(planned), at, model, question, workload.max_tokens))
        at += float(random.exponential(1 / workload.rate))
    return planned
