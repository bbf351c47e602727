"""A fine-tune as an adapter: the plan against exhaustive search, the pieces against the matrices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve_store.packed_factors import BITS, row_bytes
from deltaserve_store.spec import BaseSpec
from deltaserve_trainer.base import Base, load_model, spec_of
from deltaserve_trainer.errors import ExtractRefused
from deltaserve_trainer.extraction.activations import RIDGE, Measure, Moments, moments_of
from deltaserve_trainer.extraction.difference import difference
from deltaserve_trainer.extraction.pieces import Piece, dense_of, pieces_of
from deltaserve_trainer.extraction.plan import FORMS, Choice, Form, Plan, Worth, best_plan, plan
from deltaserve_trainer.extraction.quantise import quantised
from deltaserve_trainer.extraction.worth import Costs, directions_of, kept_by_bits, worth_of
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


def worths_of(deltas: dict[str, Tensor], *, forms: Sequence[Form] = FORMS, **costs: Any) -> dict[str, Worth]:
    """Every number counts alike."""
    costs = {"dtype": torch.float16, **costs}
    return {
        name: worth_of(name, delta, Measure.plain(IN), Costs(**costs), forms=forms) for name, delta in deltas.items()
    }


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

PLAIN: tuple[Form, ...] = ("low rank", "sparse")


def test_each_delta_gets_the_form_that_suits_it() -> None:
    worths = worths_of({"flat": flat(2, 1), "peaked": peaked(6, 2)})
    found = plan(worths, 2 * (OUT + IN) * 2 + 6 * 10, forms=PLAIN)
    assert {name: (choice.form, choice.size) for name, choice in found.choices.items()} == {
        "flat": ("low rank", 2),
        "peaked": ("sparse", 6),
    }
    assert found.kept == pytest.approx(sum(part.total for part in worths.values()))


def test_every_form_wins_where_it_should() -> None:
    deltas = {"signs": drawn(OUT, IN).sign() * 0.3, "dense": drawn(OUT, IN, seed=9), "peaked": peaked(4, 2)}
    deltas["mixed precision"] = drawn(OUT, 1, seed=1) @ drawn(1, IN, seed=2)
    expected = {"signs": "signs", "dense": "dense", "peaked": "sparse", "mixed precision": "mixed precision"}
    worths = worths_of(deltas)
    for name, form in expected.items():
        only = {name: worths[name]}
        budget = worths[name].curves[form].cost(int(worths[name].curves[form].ends[-1]))
        assert best_plan(only, budget).choices[name].form == form, name


@pytest.mark.parametrize("budget", [0, 10, 43, 44, 100, 237, 500, 901, 5000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("entry_bytes", [0, 9])
def test_the_budget_is_never_exceeded_and_what_is_told_is_true(
    budget: int, dtype: torch.dtype, entry_bytes: int
) -> None:
    deltas = {"a": flat(3, 1), "b": peaked(9, 2), "c": drawn(OUT, IN, seed=3)}
    worths = worths_of(deltas, dtype=dtype, entry_bytes=entry_bytes)
    found = best_plan(worths, budget, forms=PLAIN)
    tensors = sum(3 if choice.form == "low rank" else 4 for choice in found.choices.values())
    entries = tensors * (entry_bytes + 1) if entry_bytes else 0  # names of one letter
    assert found.num_bytes == cost(found, dtype.itemsize) + entries <= budget
    assert found.num_bytes == sum(choice.num_bytes for choice in found.choices.values())
    assert found.kept == pytest.approx(squares_kept(found, deltas), rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("budget", [0, 30, 60, 130, 237, 500, 901, 5000])
@pytest.mark.parametrize("is_fed", [False, True])
def test_what_all_forms_together_take_and_keep_is_what_their_tensors_do(budget: int, is_fed: bool) -> None:
    deltas = {"a": flat(3, 1), "b": peaked(9, 2), "c": drawn(OUT, IN, seed=3), "d": drawn(OUT, IN, seed=4).sign()}
    measure = fed(seed=5) if is_fed else Measure.plain(IN)
    costs = Costs(torch.float16)
    worths = {name: worth_of(name, delta, measure, costs) for name, delta in deltas.items()}
    wanted = [(form,) for form in FORMS] + [FORMS]
    plans = [best_plan(worths, budget, forms=forms) for forms in wanted]
    for found, made in zip(plans, pieces_of(plans, deltas.__getitem__, lambda _: measure, torch.float16), strict=True):
        assert sum(map(bytes_of, made.values())) == found.num_bytes <= budget
        kept = sum(
            worths[name].total - measure.squares(deltas[name] - dense_of(piece, (OUT, IN)))
            for name, piece in made.items()
        )
        # Directions are judged one by one and then fitted together; entries are told by bins or by a few of them.
        total = sum(worth.total for worth in worths.values())
        assert kept == pytest.approx(found.kept, rel=0.05, abs=0.04 * total if is_fed else 1e-6)
    kept = [found.kept for found in plans]
    assert kept[-1] >= max(kept[:-1])


def bytes_of(piece: Piece) -> int:
    parts = ("a", "b", "codes", "scales", "rows", "cols", "values", "delta", "signs", "scale")
    tensors = [getattr(piece, part) for part in parts if isinstance(getattr(piece, part, None), Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fed(*, seed: int) -> Measure:
    """Of inputs that hang together, and are of different sizes."""
    moments = Moments(torch.zeros(IN, dtype=torch.float64), torch.zeros(IN, IN, dtype=torch.float64))
    moments.add(drawn(200, 4, seed=seed) @ drawn(4, IN, seed=seed + 1) + 0.1 * drawn(200, IN, seed=seed + 2))
    return moments.measure()


@pytest.mark.parametrize("budget", [60, 130, 210, 300])
def test_no_other_plan_keeps_much_more(budget: int) -> None:
    """Against all combinations of ranks and of entries; one whole rank may be lost to rounding."""
    deltas = {"a": flat(3, 1), "b": peaked(9, 2)}
    found = best_plan(worths_of(deltas), budget, forms=PLAIN)
    options = [Choice("low rank", size) for size in range(1, IN + 1)] + [Choice("sparse", n) for n in range(1, 31)]
    best = 0.0
    for pair in itertools.product([None, *options], repeat=2):
        trial = Plan({name: c for name, c in zip(deltas, pair, strict=True) if c is not None}, 0, 0.0)
        if cost(trial, 2) <= budget:
            best = max(best, squares_kept(trial, deltas))
    total = sum(float(delta.square().sum()) for delta in deltas.values())
    assert squares_kept(found, deltas) >= best - 0.08 * total


@pytest.mark.parametrize("budget", [20, 45, 80, 140])
def test_bits_are_given_as_well_as_any_other_way(budget: int) -> None:
    """Against every way to give each of three directions 0, 2, 3, 4 or 8 bits; one step may be lost to rounding."""
    delta = drawn(OUT, 3, seed=1) @ (torch.diag(torch.tensor([3.0, 1.0, 0.3])) @ drawn(3, IN, seed=2))
    measure = Measure.plain(IN)
    directions = directions_of(delta, measure)
    kept = {bits: kept_by_bits(directions, bits, measure).tolist() for bits in BITS}
    kept[0] = [0.0] * 3
    price = {bits: row_bytes(IN, bits) + row_bytes(OUT, bits) + 2 * 2 for bits in BITS} | {0: 0}
    best = max(
        sum(kept[width][place] for place, width in enumerate(bits))
        for bits in itertools.product((0, *BITS), repeat=3)
        if sum(price[width] for width in bits) <= budget
    )
    worth = worths_of({"x": delta})["x"]
    found = plan({"x": worth}, budget, forms=["mixed precision"])
    bits = found.choices["x"].bits
    assert sum(price[width] for width in bits) == found.num_bytes <= budget
    assert found.kept == pytest.approx(sum(kept[width][place] for place, width in enumerate(bits)))
    assert found.kept >= best - 0.05 * worth.total
    assert list(bits) == sorted(bits, reverse=True)  # the first directions are the largest


def test_low_rank_alone_takes_the_largest_singular_values_of_all() -> None:
    deltas = {str(seed): drawn(OUT, IN, seed=seed) * (1 + seed) for seed in range(4)}
    found = plan(worths_of(deltas), 9 * (OUT + IN) * 2, forms=("low rank",))
    largest = torch.cat([torch.linalg.svdvals(delta.double()).square() for delta in deltas.values()])
    assert found.kept == pytest.approx(float(largest.topk(9).values.sum()))
    assert sum(choice.size for choice in found.choices.values()) == 9


def test_more_bytes_keep_more() -> None:
    worths = worths_of({"a": drawn(OUT, IN), "b": peaked(20, 3), "same": torch.zeros(OUT, IN)})
    kept = [best_plan(worths, budget).kept for budget in range(0, 1600, 200)]
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx(sum(part.total for part in worths.values()), rel=1e-5)


# ------------------------------------------------------------------ pieces and numbers of few bits


def test_pieces_are_what_they_are_called() -> None:
    deltas = {"a": drawn(OUT, IN), "b": peaked(9, 2)}
    small = Plan({"a": Choice("low rank", 2), "b": Choice("sparse", 3)}, 0, 0)
    large = Plan({"a": Choice("low rank", 7), "b": Choice("sparse", 9)}, 0, 0)
    made = pieces_of([small, large], deltas.__getitem__, lambda _: Measure.plain(IN), torch.float32)
    for chosen, pieces in zip((small, large), made, strict=True):
        for name, choice in chosen.choices.items():
            found = dense_of(pieces[name], (OUT, IN))
            if choice.form == "low rank":
                u, s, v = torch.linalg.svd(deltas[name])
                expected = (u[:, : choice.size] * s[: choice.size]) @ v[: choice.size]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            else:
                assert int((found != 0).sum()) == choice.size
                assert torch.equal(found[found != 0], deltas[name][found != 0])


def test_signs_are_the_best_of_their_kind() -> None:
    delta, measure = drawn(OUT, 37), Measure.plain(37)
    plans = [Plan({"x": Choice("signs", 1)}, 0, 0)]
    (made,) = pieces_of(plans, lambda _: delta, lambda _: measure, torch.float32)
    expected = delta.sign() * delta.abs().mean(dim=1, keepdim=True)  # BitDelta's scale
    torch.testing.assert_close(dense_of(made["x"], (OUT, 37)), expected)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_no_worse_than_the_nearest_of_evenly_spaced_values(bits: int) -> None:
    """Against the scale that just reaches the largest number, and against a fine search of one span's scales."""
    rows = drawn(6, 70, seed=bits)
    codes, scales, values = quantised(rows, bits, 32)
    assert int(codes.max()) < 2**bits
    assert scales.shape == (6, 3)
    top = (2**bits - 1) / 2
    wide = scales.double().repeat_interleave(32, dim=1)[:, :70]
    torch.testing.assert_close(values, wide * (codes.double() - top), atol=0, rtol=0)
    span = rows[0, :32].double()
    trials = float(span.abs().max()) / top * torch.linspace(0.3, 1.2, 400, dtype=torch.float64)[:, None]
    levels = (span / trials + top).round().clamp(0, 2 * top) - top
    best = float((trials * levels - span).square().sum(1).min())
    found = float((values[0, :32] - span).square().sum())
    assert found <= (1.7 if bits == 8 else 1.15) * best  # of so many levels a lucky scale is found by search alone


def test_rounding_looks_to_the_weights_and_spans_of_nothing_stay_nothing() -> None:
    rows = torch.cat([drawn(1, 32), torch.zeros(1, 32)])
    rows[0, 3] = 20.0
    weights = torch.ones(32)
    weights[3] = 1e-6
    *_, alike = quantised(rows, 3, 32)
    _, scales, heeded = quantised(rows, 3, 32, weights)
    others = torch.arange(32) != 3
    error = [float((values[0] - rows[0])[others].square().sum()) for values in (alike, heeded)]
    assert error[1] < 0.2 * error[0]
    assert float(scales[1]) == 0
    assert not heeded[1].any()


# ------------------------------------------------------------------ activations


@pytest.mark.parametrize("budget", [100, 200])
def test_errors_counted_in_outputs_leave_less_of_them(budget: int) -> None:
    """The nearest matrix in the measure, against the nearest in plain squares, by outputs of real inputs."""
    delta, measure = drawn(OUT, IN, seed=1), fed(seed=5)
    x = drawn(200, 4, seed=5) @ drawn(4, IN, seed=6) + 0.1 * drawn(200, IN, seed=7)
    for form in ("low rank", "mixed precision"):
        left = []
        for how in (Measure.plain(IN), measure):
            found = plan({"x": worth_of("x", delta, how, Costs(torch.float16))}, budget, forms=[form])
            (made,) = pieces_of([found], lambda _: delta, lambda _, how=how: how, torch.float16)
            left.append(float((x @ (delta - dense_of(made["x"], (OUT, IN))).t()).square().sum()))
        assert left[1] < 0.5 * left[0], form


def test_squares_are_of_outputs() -> None:
    inputs = drawn(300, IN) * torch.linspace(0.5, 2, IN)
    for matrix in (torch.zeros(IN, IN, dtype=torch.float64), None):
        moments = Moments(torch.zeros(IN, dtype=torch.float64), matrix)
        moments.add(inputs[:100].view(4, 25, IN))
        moments.add(inputs[100:])
        measure = moments.measure()
        delta = drawn(OUT, IN, seed=2)
        outputs = float((inputs @ delta.t()).square().sum()) / 300 / float(inputs.square().mean())
        exact = (1 - RIDGE) * outputs + RIDGE * float(delta.square().sum())
        assert measure.squares(delta) == pytest.approx(exact, rel=1e-4 if matrix is not None else 0.2)
        torch.testing.assert_close(measure.unrooted(measure.rooted(delta)).float(), delta, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no token"):
        Moments(torch.zeros(3, dtype=torch.float64), None).measure()


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


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_moments_are_of_what_linears_are_fed(architecture: str, place: Path) -> None:
    """By every linear's own hook; those that share a tensor share the sums, and count it once."""
    model = load_model(place / architecture)
    linears = {name: model.get_submodule(name) for name in spec(model, place).linears}
    prompts = [[5, 9, 30, 7], [12, 40]]
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0][0].double()))
        for name, module in linears.items()
    ]
    found = moments_of([(model, linears)], prompts)
    for handle in handles:
        handle.remove()
    assert set(found) == set(linears)
    for name, moments in found.items():
        inputs = torch.cat(seen[name])
        assert moments.num_tokens == len(inputs) == 6
        assert moments.matrix is not None
        torch.testing.assert_close(moments.matrix, inputs.t() @ inputs)
        torch.testing.assert_close(moments.diagonal, inputs.square().sum(0))
    names = list(linears)
    if architecture == "llama":
        assert found[names[0]] is found[names[1]] is found[names[2]]
        assert found[names[3]] is not found[names[2]]
    assert not any(module._forward_pre_hooks for module in linears.values())
    twice = moments_of([(model, linears)] * 2, prompts)
    torch.testing.assert_close(twice[names[3]].diagonal, 2 * found[names[3]].diagonal)
    torch.testing.assert_close(twice[names[2]].diagonal, 2 * found[names[2]].diagonal)


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
