"""A fine-tune as an adapter: the plan against exhaustive search, the pieces against the matrices."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltaserve_store.spec import BaseSpec
from deltaserve_trainer.base import Base, load_model, spec_of
from deltaserve_trainer.errors import ExtractRefused
from deltaserve_trainer.extraction.difference import difference
from deltaserve_trainer.extraction.pieces import Pieces
from deltaserve_trainer.extraction.plan import Choice, Plan, best_plan, plan, spectrum
from deltaserve_trainer.scoring import divergence
from deltatest.trainer_base import make_base

OUT, IN = 12, 10


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat(rank: int, seed: int) -> Tensor:
    """A delta of low rank: nothing in it is sparse."""
    return drawn(OUT, rank, seed=seed) @ drawn(rank, IN, seed=seed + 1)


def peaked(count: int, seed: int) -> Tensor:
    """A few large entries: nothing in it is of low rank."""
    delta = torch.zeros(OUT, IN)
    delta.view(-1)[torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(seed))[:count]] = 3.0
    return delta * drawn(OUT, IN, seed=seed).sign()


def squares_kept(found: Plan, deltas: dict[str, Tensor]) -> float:
    """Of the plan, from the matrices themselves."""
    kept = 0.0
    for name, choice in found.choices.items():
        if choice.form == "low rank":
            kept += float(torch.linalg.svdvals(deltas[name].double())[: choice.size].square().sum())
        else:
            kept += float(deltas[name].double().flatten().abs().topk(choice.size).values.square().sum())
    return kept


def cost(found: Plan, number_bytes: int) -> int:
    item = {"low rank": (OUT + IN) * number_bytes, "sparse": 8 + number_bytes}
    return sum(choice.size * item[choice.form] for choice in found.choices.values())


# ------------------------------------------------------------------ plans


def test_each_delta_gets_the_form_that_suits_it() -> None:
    spectra = {"flat": spectrum(flat(2, 1)), "peaked": spectrum(peaked(6, 2))}
    found = plan(spectra, 2 * (OUT + IN) * 2 + 6 * 10, number_bytes=2)
    assert found.choices == {"flat": Choice("low rank", 2), "peaked": Choice("sparse", 6)}
    assert found.kept == pytest.approx(sum(part.total for part in spectra.values()))


@pytest.mark.parametrize("budget", [0, 10, 43, 44, 100, 237, 500, 901, 5000])
@pytest.mark.parametrize("number_bytes", [2, 4])
@pytest.mark.parametrize("entry_bytes", [0, 9])
def test_the_budget_is_never_exceeded_and_what_is_told_is_true(
    budget: int, number_bytes: int, entry_bytes: int
) -> None:
    deltas = {"a": flat(3, 1), "b": peaked(9, 2), "c": drawn(OUT, IN, seed=3)}
    spectra = {name: spectrum(delta) for name, delta in deltas.items()}
    found = best_plan(spectra, budget, number_bytes=number_bytes, entry_bytes=entry_bytes)
    tensors = sum(3 if choice.form == "low rank" else 4 for choice in found.choices.values())
    entries = tensors * (entry_bytes + 1) if entry_bytes else 0  # names of one letter
    assert found.num_bytes == cost(found, number_bytes) + entries <= budget
    assert found.kept == pytest.approx(squares_kept(found, deltas), rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("budget", [60, 130, 210, 300])
def test_no_other_plan_keeps_much_more(budget: int) -> None:
    """Against all combinations of ranks and of entries; one whole rank may be lost to rounding."""
    deltas = {"a": flat(3, 1), "b": peaked(9, 2)}
    found = best_plan({name: spectrum(delta) for name, delta in deltas.items()}, budget, number_bytes=2)
    options = [Choice("low rank", size) for size in range(1, IN + 1)] + [Choice("sparse", n) for n in range(1, 31)]
    best = 0.0
    for pair in itertools.product([None, *options], repeat=2):
        trial = Plan({name: c for name, c in zip(deltas, pair, strict=True) if c is not None}, 0, 0.0)
        if cost(trial, 2) <= budget:
            best = max(best, squares_kept(trial, deltas))
    total = sum(float(delta.square().sum()) for delta in deltas.values())
    assert squares_kept(found, deltas) >= best - 0.08 * total


def test_low_rank_alone_takes_the_largest_singular_values_of_all() -> None:
    deltas = {str(seed): drawn(OUT, IN, seed=seed) * (1 + seed) for seed in range(4)}
    spectra = {name: spectrum(delta) for name, delta in deltas.items()}
    found = plan(spectra, 9 * (OUT + IN) * 2, number_bytes=2, forms=("low rank",))
    largest = torch.cat([torch.linalg.svdvals(delta.double()).square() for delta in deltas.values()])
    assert found.kept == pytest.approx(float(largest.topk(9).values.sum()))
    assert sum(choice.size for choice in found.choices.values()) == 9


def test_more_bytes_keep_more() -> None:
    spectra = {"a": spectrum(drawn(OUT, IN)), "b": spectrum(peaked(20, 3)), "same": spectrum(torch.zeros(OUT, IN))}
    kept = [best_plan(spectra, budget, number_bytes=2).kept for budget in range(0, 1600, 200)]
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx(sum(part.total for part in spectra.values()), rel=1e-6)


def test_pieces_of_a_smaller_plan_are_the_beginning_of_a_larger_ones() -> None:
    deltas = {"a": drawn(OUT, IN), "b": peaked(9, 2)}
    small = Plan({"a": Choice("low rank", 2), "b": Choice("sparse", 3)}, 0, 0)
    large = Plan({"a": Choice("low rank", 7), "b": Choice("sparse", 9)}, 0, 0)
    pieces = Pieces([small, large], deltas.__getitem__, torch.float32)
    for chosen in (small, large):
        update = pieces.update(chosen, {}, {})
        for name, choice in chosen.choices.items():
            found = update.linears[name].dense(lambda: torch.empty(0))
            if choice.form == "low rank":
                u, s, v = torch.linalg.svd(deltas[name])
                expected = (u[:, : choice.size] * s[: choice.size]) @ v[: choice.size]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            else:
                assert int((found != 0).sum()) == choice.size
                entries = update.linears[name].entries
                assert entries is not None
                assert bool((entries.keys.diff() > 0).all())
                assert torch.equal(found[found != 0], deltas[name][found != 0])


# ------------------------------------------------------------------ differences


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("difference")
    make_base(folder / "llama")
    make_base(folder / "gpt2", architecture="gpt2")
    return folder


def spec(model: torch.nn.Module, folder: Path) -> BaseSpec:
    return spec_of(model, Base(folder, "tiny", "ef" * 32))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_difference_is_told_in_the_orientation_of_adapters(architecture: str, place: Path) -> None:
    base, tuned = load_model(place / architecture), load_model(place / architecture)
    known = spec(base, place)
    name = list(known.linears)[2]
    linear = known.linears[name]
    change = drawn(linear.out_features, linear.in_features)
    weight = tuned.get_submodule(name).get_parameter("weight").data
    weight += change.t() if linear.transposed else change
    tuned.get_input_embeddings().weight.data[3] += 1.0  # type: ignore[operator, union-attr]
    found = difference(base, tuned, known)
    assert list(found.changed()) == [name]
    torch.testing.assert_close(found.matrix(name), change, atol=1e-6, rtol=1e-5)
    ((other, squares),) = found.not_carried.items()
    assert "emb" in other or "wte" in other
    assert squares == pytest.approx(32.0, rel=1e-4)
    if architecture == "gpt2":
        tuned.get_submodule(name).get_parameter("bias").data += 0.5
        torch.testing.assert_close(
            difference(base, tuned, known).biases[name], torch.full((linear.out_features,), 0.5), atol=1e-6, rtol=0
        )


def test_what_is_no_fine_tune_of_the_base_is_refused(place: Path) -> None:
    base, same, other = (load_model(place / name) for name in ("llama", "llama", "gpt2"))
    known = spec(base, place)
    with pytest.raises(ExtractRefused, match="differs from the base"):
        difference(base, same, known)
    with pytest.raises(ExtractRefused, match="different parameters"):
        difference(base, other, known)
    same.get_input_embeddings().weight.data += 1.0  # type: ignore[operator, union-attr]
    with pytest.raises(ExtractRefused, match=r"embed_tokens\.weight, which adapters cannot change yet"):
        difference(base, same, known)
    same.resize_token_embeddings(400)  # type: ignore[operator]
    with pytest.raises(ExtractRefused, match="another vocabulary or shape"):
        difference(base, same, known)
    damaged = load_model(place / "llama")
    next(damaged.parameters()).data[0, 0] = float("nan")
    with pytest.raises(ExtractRefused, match="not finite"):
        difference(base, damaged, known)


def test_divergence_is_that_of_the_distributions() -> None:
    meant, found = [drawn(5, 20), drawn(3, 20, seed=1)], [drawn(5, 20, seed=2), drawn(3, 20, seed=3)]
    total = sum(
        float(torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"))
        for p, q in zip(meant, found, strict=True)
    )
    assert divergence(meant, found) == pytest.approx(total / 8, rel=1e-5)
    assert divergence(meant, meant) == 0.0
