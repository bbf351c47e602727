"""What is asked, when: a plan made from a seed before the first request is sent.

Open loop (``plan``): arrivals do not wait for answers, so a slow server meets a growing queue instead of a politer
client. Closed loop (``streams``): a fixed number of clients, each sending its next request when it has its answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

POPULARITIES = ("uniform", "distinct", "zipf")
TOPICS = ("a fox", "the old bridge", "a baker", "the harbour", "a kite", "two sisters", "the rain", "a clockmaker")
OPENINGS = (
    "Tell me a short story about {topic}.",
    "What would you say about {topic}?",
    "Describe {topic} in a few words.",
    "Give me one piece of advice about {topic}.",
)

Prompt = str | tuple[int, ...]
"""Text, or token ids where every server must see exactly the same tokens."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Parameters of an open-loop plan. ``rate`` is requests per second; ``base_share`` the share asked of the base.

    ``popularity``: ``uniform``; ``distinct``, each request the next adapter in turn; ``zipf``, the k-th adapter
    (from 1) has weight ``k ** -zipf_s``. ``is_count_fixed``: ``rate * seconds`` arrivals, rounded, instead of as many
    as the Poisson law happens to give; their times are those of such arrivals given their number.
    """

    rate: float
    seconds: float
    seed: int = 0
    is_count_fixed: bool = False
    popularity: str = "uniform"
    zipf_s: float = 0.9
    base_share: float = 0.1
    num_prompts: int = 16
    max_tokens: int = 32

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.seconds <= 0:
            raise ValueError(f"rate ({self.rate}) and seconds ({self.seconds}) must be greater than 0")
        check_popularity(self.popularity)
        if not 0 <= self.base_share <= 1:
            raise ValueError(f"base_share is {self.base_share}; it must be between 0 and 1")
        if self.num_prompts < 1 or self.max_tokens < 1:
            raise ValueError("num_prompts and max_tokens must be at least 1")


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Parameters of a closed loop: ``concurrency`` streams of ``requests_per_stream`` requests each.

    Under ``distinct`` stream i keeps to adapter ``i % n``, or, where there are more adapters than streams, the streams
    take them all in turn; under the other laws each request draws its adapter.
    ``prompt_tokens`` random ids from ``plain_tokens`` (low, high) make a prompt, and no two prompts are equal.
    """

    concurrency: int
    requests_per_stream: int = 2
    seed: int = 0
    popularity: str = "distinct"
    zipf_s: float = 0.9
    prompt_tokens: int = 64
    max_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("concurrency", "requests_per_stream", "prompt_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_popularity(self.popularity)


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One greedy request to ``model``. ``at_seconds`` after the start; in a closed loop the moment it is sent."""

    index: int
    at_seconds: float
    model: str
    prompt: Prompt
    max_tokens: int


def check_popularity(name: str) -> None:
    if name not in POPULARITIES:
        raise ValueError(f"popularity is {name!r}; it must be one of {', '.join(POPULARITIES)}")


def popularity(law: str, num_adapters: int, zipf_s: float = 0.9) -> np.ndarray:
    """Probability of each adapter, float64 ``[num_adapters]``, given that an adapter is asked."""
    if law == "zipf":
        weights = np.arange(1, num_adapters + 1, dtype=np.float64) ** -zipf_s
    else:
        weights = np.ones(num_adapters)
    return weights / weights.sum()


def prompts(count: int) -> list[str]:
    """``count`` distinct prompts; few enough that the same question meets the same adapter more than once."""
    made = [opening.format(topic=topic) for topic in TOPICS for opening in OPENINGS]
    made += [f"{made[i % len(made)]} (No. {i})" for i in range(count - len(made))]
    return made[:count]


def token_prompts(count: int, length: int, plain_tokens: tuple[int, int], seed: int) -> list[tuple[int, ...]]:
    """``count`` distinct prompts of ``length`` token ids. Another seed gives prompts that share no first block.

    Raises ``ValueError`` where so few tokens allow no ``count`` distinct prompts.
    """
    low, high = plain_tokens
    if length * np.log(max(high - low, 1)) < np.log(4.0 * count):
        raise ValueError(f"{count} distinct prompts of {length} tokens cannot be made of {high - low} tokens")
    random = np.random.default_rng((seed, length))
    made: dict[tuple[int, ...], None] = {}
    while len(made) < count:
        made[tuple(int(i) for i in random.integers(low, high, size=length))] = None
    return list(made)


def plan(workload: Workload, base: str, adapters: Sequence[str], asked: Sequence[Prompt] = ()) -> list[PlannedRequest]:
    """Poisson arrivals of ``rate`` for ``seconds``. The same arguments give the same plan.

    Prompts are drawn from ``num_prompts`` texts, or from ``asked`` where given.
    """
    random = np.random.default_rng(workload.seed)
    questions: Sequence[Prompt] = asked or prompts(workload.num_prompts)
    pmf = popularity(workload.popularity, len(adapters), workload.zipf_s) if adapters else None
    planned: list[PlannedRequest] = []
    turn = 0
    for at in arrivals(workload, random):
        if pmf is None or random.random() < workload.base_share:
            model = base
        elif workload.popularity == "distinct":
            model, turn = adapters[turn % len(adapters)], turn + 1
        else:
            model = adapters[int(random.choice(len(adapters), p=pmf))]
        question = questions[int(random.integers(len(questions)))]
        planned.append(PlannedRequest(len(planned), at, model, question, workload.max_tokens))
    return planned


def arrivals(workload: Workload, random: np.random.Generator) -> Iterator[float]:
    """Ascending times within ``seconds``. ``random`` is drawn from between them."""
    if workload.is_count_fixed:
        yield from np.sort(
            random.uniform(0, workload.seconds, max(1, round(workload.rate * workload.seconds)))
        ).tolist()
        return
    at = float(random.exponential(1 / workload.rate))
    while at < workload.seconds:
        yield at
        at += float(random.exponential(1 / workload.rate))


def streams(loop: ClosedLoop, models: Sequence[str], plain_tokens: tuple[int, int]) -> list[list[PlannedRequest]]:
    """One list of requests per stream, every prompt of the plan distinct. ``models`` is not empty; base or adapters."""
    random = np.random.default_rng(loop.seed)
    pmf = popularity(loop.popularity, len(models), loop.zipf_s)
    count = loop.concurrency * loop.requests_per_stream
    asked = iter(token_prompts(count, loop.prompt_tokens, plain_tokens, loop.seed))
    planned: list[list[PlannedRequest]] = []
    index = 0
    for stream in range(loop.concurrency):
        own = []
        for turn in range(loop.requests_per_stream):
            number = stream if len(models) <= loop.concurrency else turn * loop.concurrency + stream
            if loop.popularity != "distinct":
                number = int(random.choice(len(models), p=pmf))
            own.append(PlannedRequest(index, 0.0, models[number % len(models)], next(asked), loop.max_tokens))
            index += 1
        planned.append(own)
    return planned
