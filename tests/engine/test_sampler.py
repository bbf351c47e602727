"""The sampler against transformers' logits processors, and its own promises: exact greedy, nobody's company matters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltaserve.core import BASE_BINDING, SamplingParams
from deltaserve.engine.draw import CANDIDATES
from deltaserve.engine.sampler import Sampler
from deltaserve.engine.sequence import Sequence

VOCAB = 1500
GRID = 2000


class Draws:
    """Stands for a sequence's random numbers: a fixed list."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


def seq(
    draws: tuple[float, ...] = (0.5,),
    prompt: tuple[int, ...] = (1,),
    completion: tuple[int, ...] = (),
    stops: tuple[int, ...] = (),
    **sampling: Any,
) -> Sequence:
    made = Sequence(
        seq_id=0,
        request_id="r",
        index=0,
        token_ids=[*prompt, *completion],
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(**{"max_tokens": 100, **sampling}),
        binding=BASE_BINDING,
        versions=(),
        priority=(0.0, 0),
        arrival_seconds=0.0,
        stop_token_ids=frozenset(stops),
    )
    made.rng = Draws(*draws)  # type: ignore[assignment]
    return made


def rows(count: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def oracle(row: torch.Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities [vocab] of transformers' own chain."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    return torch.softmax(chain(None, row[None].clone()), dim=-1)[0].double()


def drawn_probabilities(row: torch.Tensor, **sampling: Any) -> torch.Tensor:
    """The sampler's distribution, read off by drawing at the midpoints of a fine grid."""
    count = GRID
    grid = [(i + 0.5) / count for i in range(count)]
    tokens = Sampler(VOCAB).sample(row.expand(count, -1), [seq((u,), **sampling) for u in grid])
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB).double() / count


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.3, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.8, "min_p": 0.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.6, "min_p": 0.02},
        {"temperature": 0.5, "top_k": 1, "top_p": 0.5, "min_p": 0.5},
        {"temperature": 30.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0},  # nearly flat: more than the first candidates
        {"temperature": 30.0, "top_k": CANDIDATES[0] + 100, "top_p": 0.99, "min_p": 0.01},
        {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.5},
        {"temperature": 1.0, "top_k": VOCAB * 2, "top_p": 0.9, "min_p": 0.0},
    ],
)
def test_the_distribution_is_that_of_transformers(settings: dict[str, Any]) -> None:
    row = rows(1, seed=3)[0]
    expected = oracle(row, **settings)
    found = drawn_probabilities(row, **settings)
    # The grid resolves 1/GRID: each token's share is right to a grid cell at either end of its interval.
    assert (found - expected).abs().max() <= 2 / GRID
    assert found[expected == 0].sum() == 0


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    batch = rows(4)
    prompts = [(1, 2, 3), (4, 4, 5), (6,), (999, 0)]
    completions = [(7, 8), (), (6, 6, 6), (5,)]
    for row, prompt, completion in zip(batch, prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, row[None].clone())[0]
        made = seq(prompt=prompt, completion=completion, temperature=0.0, repetition_penalty=penalty)
        assert torch.equal(Sampler(VOCAB)._adjust(row[None], [made])[0], expected)


def test_presence_and_frequency_count_sampled_tokens_only() -> None:
    row = rows(1)[0]
    made = seq(prompt=(1, 2), completion=(3, 3, 4), temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)
    expected = row.clone()
    expected[3] -= 0.5 + 2 * 0.25
    expected[4] -= 0.5 + 0.25
    assert torch.allclose(Sampler(VOCAB)._adjust(row[None], [made])[0], expected)
    flat = torch.zeros(1, VOCAB)
    flat[0, 10] = 0.4
    sampler, greedy = Sampler(VOCAB), seq(temperature=0.0, presence_penalty=0.5)
    first = sampler.sample(flat, [greedy])
    greedy.token_ids += first
    assert first == [10]
    assert sampler.sample(flat, [greedy]) != [10]  # counts follow what was sampled


def test_logit_bias_and_forbidden_stops() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 7] = 1.0
    sampler = Sampler(VOCAB)
    assert sampler.sample(row, [seq(temperature=0.0, logit_bias=((9, 2.0),))]) == [9]
    assert sampler.sample(row, [seq(temperature=0.0, logit_bias=((7, -100.0),))]) != [7]
    assert sampler.sample(row, [seq(temperature=0.0, stops=(7,), min_tokens=1)]) != [7]
    assert sampler.sample(row, [seq(temperature=0.0, stops=(7,), min_tokens=1, completion=(3,))]) == [7]
    assert sampler.sample(row, [seq(temperature=1.0, stops=(7,), min_tokens=1, draws=(0.9999999,))]) != [7]
    assert float(row[0, 7]) == 1.0  # the model's own row is left as it was


def test_greedy_is_the_exact_argmax_and_tiny_temperatures_agree() -> None:
    batch = rows(64, seed=5)
    expected = batch.argmax(dim=-1).tolist()
    assert Sampler(VOCAB).sample(batch, [seq(temperature=0.0) for _ in range(64)]) == expected
    for temperature in (1e-6, 1e-30, 1e-45):
        tokens = Sampler(VOCAB).sample(batch, [seq((0.999,), temperature=temperature) for _ in range(64)])
        assert tokens == expected


@pytest.mark.parametrize("draw", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_impossible_tokens_are_never_drawn(draw: float) -> None:
    row = torch.full((1, VOCAB), float("-inf"))
    row[0, 500] = 1.0
    row[0, 700] = 1.0
    for sampling in ({}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.01}):
        assert Sampler(VOCAB).sample(row, [seq((draw,), temperature=1.0, **sampling)])[0] in (500, 700)


def test_a_token_does_not_depend_on_who_shares_the_batch() -> None:
    batch = rows(32, seed=9)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 20.0, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 10, "repetition_penalty": 1.2},
        {"temperature": 1.0, "min_p": 0.05, "frequency_penalty": 0.5, "completion": (1, 2, 2)},
    ]

    def make(i: int) -> Sequence:
        return seq(((i * 0.37) % 1.0,), **kinds[i % len(kinds)])

    together = Sampler(VOCAB).sample(batch, [make(i) for i in range(32)])
    alone = [Sampler(VOCAB).sample(batch[i : i + 1], [make(i)])[0] for i in range(32)]
    assert together == alone
    order = list(reversed(range(32)))
    assert Sampler(VOCAB).sample(batch[order], [make(i) for i in order]) == list(reversed(together))


def test_logprobs_are_of_the_raw_distribution() -> None:
    batch = rows(130)
    ids = [i * 7 % VOCAB for i in range(130)]
    expected = torch.log_softmax(batch, dim=-1)
    found = Sampler(VOCAB).logprobs(batch, ids, 3)
    for row, token_id, entry in zip(expected, ids, found, strict=True):
        assert entry.token_id == token_id
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-6)
        values, indices = row.topk(3)
        assert [token for token, _ in entry.top] == indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-6)
    assert Sampler(VOCAB).logprobs(batch[:1], ids[:1], 0)[0].top == ()


TRACE = 2**-10


def told_by_width(rows: torch.Tensor, **options: Any) -> torch.Tensor:
    """``log_softmax`` with a trace of the width, as a sum leaves that is cut by it: on a GPU threads share a row by its
    length. PyTorch's own on a CPU happens to give a row that ends in minus infinity the bits of the shorter one."""
    return rows.log_softmax(dim=-1) - TRACE * rows.shape[1]


@pytest.mark.parametrize("num_added", [0, 3])
@pytest.mark.parametrize("width", [VOCAB + 5, VOCAB + 64, VOCAB + 700])
def test_logprobs_have_the_bits_of_a_step_without_wider_adapters(
    num_added: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside an adapter that adds more tokens a row is wider, minus infinity there; its sum is cut no other way."""
    monkeypatch.setattr(torch, "log_softmax", told_by_width)
    own = VOCAB + num_added
    alone, wide = rows(70, seed=4, vocab=own), torch.full((72, width), float("-inf"))
    wide[1:71, :own], wide[0], wide[71] = alone, *rows(2, seed=5, vocab=width)
    ids = [i * 11 % own for i in range(70)]
    wanted = Sampler(VOCAB).logprobs(alone, ids, 4)
    found = Sampler(VOCAB).logprobs(wide, [width - 1, *ids, width - 2], 4)
    assert found[1:71] == wanted
    for row, token, entry in ((0, width - 1, found[0]), (71, width - 2, found[71])):
        assert entry.logprob == pytest.approx(float(told_by_width(wide[row : row + 1])[0, token]), abs=1e-5)


def test_rows_that_are_not_numbers_are_told() -> None:
    batch = rows(4)
    batch[1, 5] = float("nan")
    batch[2, 5] = float("inf")
    batch[3] = float("-inf")
    tokens = Sampler(VOCAB).sample(batch, [seq(temperature=t) for t in (1.0, 1.0, 0.0, 1.0)])
    assert tokens[0] >= 0
    assert tokens[1:] == [-1, -1, -1]


class Looks(TorchFunctionMode):
    """Counts how often tensors come to the host: on a GPU each is a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__"):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_the_device_once() -> None:
    """Whatever mixture of greedy, drawn, filtered, penalised and biased rows; a row of no numbers among them."""
    some = [
        seq(temperature=0.0),
        seq(temperature=1.0),
        seq(temperature=0.7, top_p=0.5),
        seq(temperature=0.0, repetition_penalty=1.3),
        seq(temperature=1.0, logit_bias=((3, 2.0),)),
        seq(temperature=0.0, stops=(4, 7), min_tokens=3),
        seq(temperature=1.0, top_k=5),
        seq(temperature=1.0),
    ]
    numbers = rows(len(some))
    numbers[6, 2] = numbers[7, 0] = float("nan")
    sampler = Sampler(VOCAB)
    with Looks() as looks:
        tokens = sampler.sample(numbers, some)
    assert looks.count == 1
    assert tokens[6:] == [-1, -1]
    alone = [
        Sampler(VOCAB).sample(numbers[i : i + 1], [seq(**kwargs)])[0]
        for i, kwargs in ((0, {"temperature": 0.0}), (1, {"temperature": 1.0}), (2, {"temperature": 0.7, "top_p": 0.5}))
    ]
    assert tokens[:3] == alone
