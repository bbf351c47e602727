"""Merges against peft's own functions, and against sums of full matrices where peft has no such method."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from deltaserve_store.dense_deltas import DenseDelta, SignDelta, WholeDelta
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import LoraDelta, ParsedAdapter, SparseDelta
from deltaserve_store.spec import BaseSpec, LinearSpec, NormSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltaserve_trainer.errors import MergeRefused
from deltaserve_trainer.merging import elementwise, low_rank
from deltaserve_trainer.merging.low_rank import Factors
from deltaserve_trainer.merging.merge import compressed, depth_profile, merge, moving_average, seeded
from deltaserve_trainer.merging.model_stock import ratio_of
from deltaserve_trainer.merging.options import MergeOptions
from deltaserve_trainer.merging.soup import greedy_soup
from deltaserve_trainer.merging.update import Update, update_of
from deltaserve_trainer.merging.write import write_update

OUT, IN = 12, 10
LAYERS = ("model.layers.0.q", "model.layers.1.q", "model.layers.2.q")
SPEC = BaseSpec(
    fingerprint="ab" * 32,
    names=("tests/tiny",),
    model_type="llama",
    linears={name: LinearSpec(name, OUT, IN, has_bias=True) for name in LAYERS},
    norms={"model.norm": NormSpec("model.norm", IN, has_bias=True)},
    vocab_size=64,
    num_layers=3,
    hidden_size=IN,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100 * sum(shape)))


class Numbers:
    """A base of random numbers."""

    def weight(self, linear: str) -> Tensor:
        return drawn(OUT, IN, seed=LAYERS.index(linear))

    def bias(self, linear: str) -> Tensor | None:
        return drawn(OUT, seed=LAYERS.index(linear))

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        return drawn(IN, seed=7), drawn(IN, seed=8)


BASE = Numbers()


def adapter(
    *deltas: LoraDelta | SparseDelta | DenseDelta | WholeDelta | SignDelta | VectorDelta | NormDelta,
) -> ParsedAdapter:
    return ParsedAdapter("lora", "test", deltas, {}, None, None, None, 1)


def lora(seed: int, rank: int = 2, layers: tuple[str, ...] = LAYERS) -> ParsedAdapter:
    return adapter(
        *(
            LoraDelta(n, drawn(rank, IN, seed=seed + i), drawn(OUT, rank, seed=seed + i), 0.5)
            for i, n in enumerate(layers)
        )
    )


def sparse(seed: int, count: int = 30, layers: tuple[str, ...] = LAYERS) -> ParsedAdapter:
    deltas = []
    for index, name in enumerate(layers):
        flat = torch.randperm(OUT * IN, generator=torch.Generator().manual_seed(seed + index))[:count]
        deltas.append(SparseDelta(name, (flat // IN).int(), (flat % IN).int(), drawn(count, seed=seed + index)))
    return adapter(*deltas)


def mixed(seed: int) -> ParsedAdapter:
    """Every sort of change at once."""
    name, other, last = LAYERS
    return adapter(
        *lora(seed, layers=(name, other)).deltas,
        *sparse(seed, layers=(other,)).deltas,
        VectorDelta(name, out_scale=1 + 0.1 * drawn(OUT, seed=seed), bias=drawn(OUT, seed=seed + 1)),
        VectorDelta(last, out_scale=drawn(OUT, seed=seed), scales_bias=True, new_bias=drawn(OUT, seed=seed + 2)),
        NormDelta("model.norm", gain=drawn(IN, seed=seed), shift=drawn(IN, seed=seed + 1), replaces=True),
    )


def updates(*adapters: ParsedAdapter) -> list[Update]:
    return [update_of(parsed, SPEC, BASE) for parsed in adapters]


def matrix(update: Update, name: str) -> Tensor:
    change = update.linears.get(name)
    return torch.zeros(OUT, IN) if change is None else change.dense(lambda: BASE.weight(name))


def vector(update: Update, name: str, part: str, size: int) -> Tensor:
    found = update.norms.get(name, {}) if name in SPEC.norms else update.linears[name].vectors
    return found.get(part, torch.zeros(size))


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)


# ------------------------------------------------------------------ formulas


@pytest.mark.parametrize("density", [0.1, 0.33, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -0.4, 2.0)])
def test_ties_is_that_of_peft(density: float, weights: tuple[float, ...]) -> None:
    deltas = [drawn(OUT, IN, seed=i) for i in range(3)]
    expected = merge_utils.ties(deltas, torch.tensor(weights), min(density, 0.9999999))
    same(elementwise.ties(deltas, weights, density), expected if density < 1 else _untrimmed(deltas, weights))


def _untrimmed(deltas: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    stack = torch.stack(deltas)
    mask = merge_utils.calculate_majority_sign_mask(stack)
    return merge_utils.disjoint_merge(stack * torch.tensor(weights)[:, None, None], mask)


@pytest.mark.parametrize("density", [0.2, 0.8])
def test_dare_is_that_of_peft(density: float) -> None:
    """peft draws all masks from one global stream."""
    deltas, weights = [drawn(OUT, IN, seed=i) for i in range(3)], (0.7, -0.4, 2.0)
    torch.manual_seed(5)
    expected = merge_utils.dare_linear(deltas, torch.tensor(weights), density)
    stream = torch.Generator().manual_seed(5)
    same(elementwise.dare(deltas, weights, density, [stream] * 3), expected)


def test_dare_keeps_the_expected_delta() -> None:
    delta = drawn(OUT, IN)
    draws = [elementwise.drop_at_random(delta, 0.3, seeded(seed, "x")) for seed in range(4000)]
    torch.testing.assert_close(torch.stack(draws).mean(0), delta, atol=0.15, rtol=0.1)


def test_negmerge_keeps_exactly_what_all_agree_on() -> None:
    deltas = [drawn(OUT, IN, seed=i) for i in range(3)]
    deltas[0][0, 0] = deltas[1][0, 0] = deltas[2][0, 0] = 0.0
    result = elementwise.negmerge(deltas, 0.5)
    for i, j in itertools.product(range(OUT), range(IN)):
        values = [float(delta[i, j]) for delta in deltas]
        agreed = all(v > 0 for v in values) or all(v < 0 for v in values)
        assert float(result[i, j]) == pytest.approx(-0.5 * sum(values) / 3 if agreed else 0.0, abs=1e-6)


def test_low_rank_products_are_never_formed_and_right() -> None:
    one, other = (
        Factors(drawn(3, IN, seed=1), drawn(OUT, 3, seed=2)),
        Factors(drawn(2, IN, seed=3), drawn(OUT, 2, seed=4)),
    )
    total = low_rank.concatenated([(0.5, one), (-2.0, other)])
    same(total.dense(), 0.5 * one.dense() - 2 * other.dense())
    assert low_rank.inner(one, other) == pytest.approx(float((one.dense() * other.dense()).sum()), rel=1e-5)
    assert low_rank.norm(total) == pytest.approx(float(total.dense().norm()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncation_is_the_best_of_its_rank(rank: int) -> None:
    factors = Factors(drawn(5, IN, seed=1), drawn(OUT, 5, seed=2))
    cut = low_rank.truncated(factors, rank)
    assert cut.rank == rank
    s = torch.linalg.svdvals(factors.dense().double())
    least = float(s[rank:].norm() / s.norm())
    assert low_rank.relative_error(cut, factors) == pytest.approx(least, abs=1e-6)
    same(low_rank.nearest(factors.dense(), rank).dense(), cut.dense())


def test_ratio_of_model_stock() -> None:
    assert ratio_of(1.0, 2) == 1.0
    assert ratio_of(0.0, 5) == ratio_of(-0.3, 5) == 0.0
    assert ratio_of(0.5, 2) == pytest.approx(2 * 0.5 / 1.5)


def test_moving_average_is_the_recurrence() -> None:
    slow = torch.tensor(3.0)
    values = [3.0, 5.0, -2.0, 7.0]
    for fast in values[1:]:
        slow = 0.9 * slow + 0.1 * fast
    weights = moving_average(4, 0.9)
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(float(slow))
    assert sum(weights) == pytest.approx(1.0)


def test_depth_profile_runs_from_first_to_last_layer() -> None:
    profile = [depth_profile(name, 3, 0.2, 0.6) for name in (*LAYERS, "model.norm")]
    assert profile == pytest.approx([0.2, 0.5, 0.8, 0.8])
    assert depth_profile(LAYERS[1], 3, 1.0, 0.0) == 1.0


# ------------------------------------------------------------------ whole adapters

WEIGHTED: dict[str, tuple[MergeOptions, Callable[[int, str], float]]] = {
    "linear": (MergeOptions("linear", weights=(0.7, -0.4)), lambda i, _: (0.7, -0.4)[i]),
    "soup": (MergeOptions("soup"), lambda i, _: 0.5),
    "ema": (MergeOptions("ema", momentum=0.75), lambda i, _: (0.75, 0.25)[i]),
    "lines": (
        MergeOptions("lines", alpha=0.2, beta=0.6),
        lambda i, name: 0.8 if "layers" not in name else 0.2 + 0.3 * int(name.split(".")[2]),
    ),
}


@pytest.mark.parametrize("method", WEIGHTED)
@pytest.mark.parametrize("make", [lora, sparse, mixed])
def test_weighted_sums_are_exact(method: str, make: Callable[[int], ParsedAdapter]) -> None:
    options, weigh = WEIGHTED[method]
    parts = updates(make(1), make(50))
    merged = merge(parts, options, SPEC, BASE)
    assert not merged.errors
    stored, errors = compressed(merged.update, None, torch.float32)
    assert max(errors.values(), default=0.0) < 1e-6
    for name in LAYERS:
        expected = sum(weigh(i, name) * matrix(part, name) for i, part in enumerate(parts))
        same(matrix(stored, name), torch.as_tensor(expected))
        bias = sum(weigh(i, name) * vector(part, name, "bias", OUT) for i, part in enumerate(parts))
        same(vector(stored, name, "bias", OUT), torch.as_tensor(bias))
    for part_name in ("gain", "shift"):
        expected = sum(weigh(i, "model.norm") * vector(p, "model.norm", part_name, IN) for i, p in enumerate(parts))
        same(vector(stored, "model.norm", part_name, IN), torch.as_tensor(expected))


def test_a_sum_of_loras_holds_both_factors_and_no_svd() -> None:
    merged = merge(updates(lora(1, rank=2), lora(9, rank=3)), MergeOptions("linear"), SPEC, BASE)
    factors = merged.update.linears[LAYERS[0]].factors
    assert factors is not None
    assert factors.rank == 5
    assert torch.equal(factors.a[:2], drawn(2, IN, seed=1))


@pytest.mark.parametrize("make", [lora, sparse, mixed])
def test_a_minus_a_is_nothing(make: Callable[[int], ParsedAdapter], tmp_path: Path) -> None:
    merged = merge(updates(make(1), make(1)), MergeOptions("linear", weights=(1.0, -1.0)), SPEC, BASE)
    left, _ = compressed(merged.update, None, torch.float32)
    with pytest.raises(MergeRefused, match="nothing is left"):
        write_update(left, tmp_path, SPEC.fingerprint, base_name=None, method="x")


def test_whole_matrices_and_signs_add_up_with_others() -> None:
    words = torch.randint(0, 1 << IN, (OUT, 1), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    whole, scale = drawn(OUT, IN, seed=4), drawn(OUT, seed=5).abs()
    matrices = adapter(DenseDelta(LAYERS[0], whole.half()), SignDelta(LAYERS[1], words, scale))
    (one,) = updates(lora(1))
    merged = merge(updates(lora(1), matrices), MergeOptions("linear", weights=(1.0, 2.0)), SPEC, BASE)
    same(matrix(merged.update, LAYERS[0]), matrix(one, LAYERS[0]) + 2 * whole.half().float())
    signs = torch.tensor([[1.0 if int(word) >> column & 1 else -1.0 for column in range(IN)] for word in words])
    same(matrix(merged.update, LAYERS[1]), matrix(one, LAYERS[1]) + 2 * signs * scale[:, None])
    same(matrix(merged.update, LAYERS[2]), matrix(one, LAYERS[2]))


def test_modules_saved_whole_add_up_by_their_difference(tmp_path: Path) -> None:
    """Weight and bias of one linear in place of the base's, beside a LoRA elsewhere; at weight 1 it is what it was."""
    whole, bias = drawn(OUT, IN, seed=41), drawn(OUT, seed=42)
    saved = adapter(
        WholeDelta(LAYERS[1], whole.half()), VectorDelta(LAYERS[1], new_bias=bias), *lora(3, layers=LAYERS[:1]).deltas
    )
    both = merge(updates(saved, lora(5)), MergeOptions("linear", weights=(0.25, 2.0)), SPEC, BASE).update
    other = updates(lora(5))[0]
    change = whole.half().float() - BASE.weight(LAYERS[1])
    same(matrix(both, LAYERS[1]), 0.25 * change + 2 * matrix(other, LAYERS[1]))
    same(vector(both, LAYERS[1], "bias", OUT), 0.25 * (bias - BASE.bias(LAYERS[1])))
    write_update(
        merge(updates(saved), MergeOptions("linear", weights=(1.0,)), SPEC, BASE).update,
        tmp_path,
        "ab" * 32,
        base_name=None,
        method="test",
    )
    again = updates(read_adapter(tmp_path, SPEC))[0]
    same(BASE.weight(LAYERS[1]) + matrix(again, LAYERS[1]), whole.half().float())
    nothing = update_of(adapter(WholeDelta(LAYERS[1], BASE.weight(LAYERS[1]))), SPEC, BASE)
    assert not nothing.linears[LAYERS[1]].entries.values.any()


def test_an_adapter_that_leaves_a_layer_alone_counts_as_zero_there() -> None:
    merged = merge(updates(lora(1), lora(9, layers=LAYERS[:1])), MergeOptions("soup"), SPEC, BASE)
    alone = updates(lora(1))[0]
    same(matrix(merged.update, LAYERS[2]), matrix(alone, LAYERS[2]) / 2)


@pytest.mark.parametrize("make", [lora, sparse, mixed])
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_elementwise_methods_form_each_matrix(method: str, make: Callable[[int], ParsedAdapter]) -> None:
    parts = updates(make(1), make(50), make(70))
    options = MergeOptions(method, weights=(1.0, 0.5, 2.0), density=0.4, form="sparse")
    merged = merge(parts, options, SPEC, BASE)
    assert not merged.errors
    for name in LAYERS:
        dense = [matrix(part, name) for part in parts]
        if method == "ties":
            expected = merge_utils.ties(dense, torch.tensor([1.0, 0.5, 2.0]), 0.4)
        else:
            masks = [torch.bernoulli(torch.full((OUT, IN), 0.4), generator=seeded(0, f"{i}:{name}")) for i in range(3)]
            expected = sum(w * d * m / 0.4 for w, d, m in zip((1.0, 0.5, 2.0), dense, masks, strict=True))
        same(matrix(merged.update, name), torch.as_tensor(expected))


def test_dare_is_the_same_whenever_it_is_done_and_other_with_another_seed() -> None:
    def done(seed: int) -> Tensor:
        return matrix(merge(updates(lora(1), lora(2)), MergeOptions("dare", seed=seed), SPEC, BASE).update, LAYERS[0])

    assert torch.equal(done(3), done(3))
    assert not torch.equal(done(3), done(4))


def test_an_elementwise_result_of_loras_is_the_nearest_low_rank_matrix_and_says_what_it_lost() -> None:
    parts = updates(lora(1), lora(50))
    full = merge(parts, MergeOptions("ties", density=0.4, form="sparse"), SPEC, BASE).update
    merged = merge(parts, MergeOptions("ties", density=0.4), SPEC, BASE)
    for name in LAYERS:
        meant = matrix(full, name)
        found = merged.update.linears[name].factors
        assert found is not None
        assert found.rank == 4
        s = torch.linalg.svdvals(meant.double())
        assert merged.errors[name] == pytest.approx(float(s[4:].norm() / s.norm()), abs=1e-6)
        assert merged.errors[name] == pytest.approx(float((found.dense() - meant).norm() / meant.norm()), abs=1e-5)
        assert merged.errors[name] > 0.01


@pytest.mark.parametrize("make", [lora, sparse, mixed])
def test_model_stock_uses_the_angle_of_each_layer(make: Callable[[int], ParsedAdapter]) -> None:
    parts = updates(make(1), make(50), make(70))
    # Deltas of one family lie near one another, else every ratio would be about 0.
    near = [merge([parts[0], part], MergeOptions("linear", weights=(1.0, 0.5)), SPEC, BASE).update for part in parts]
    merged = merge(near, MergeOptions("model-stock"), SPEC, BASE)
    for name in LAYERS:
        flat = [matrix(update, name).double().flatten() for update in near]
        if not all(bool(delta.any()) for delta in flat):
            continue
        cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(flat, 2)]
        cosine = sum(cosines) / 3
        ratio = 3 * cosine / (1 + 2 * cosine)
        assert merged.ratios[name] == pytest.approx(ratio, rel=1e-5)
        same(matrix(merged.update, name).flatten(), (ratio * sum(flat) / 3).float())


def test_model_stock_of_equals_is_the_same_again() -> None:
    merged = merge(updates(mixed(1), mixed(1)), MergeOptions("model-stock"), SPEC, BASE)
    for name in LAYERS:
        same(matrix(merged.update, name), matrix(updates(mixed(1))[0], name))
        same(vector(merged.update, name, "bias", OUT), vector(updates(mixed(1))[0], name, "bias", OUT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 3])
def test_what_compression_loses_is_measured(dtype: torch.dtype, rank: int | None) -> None:
    update = merge(updates(lora(1, rank=4), lora(9, rank=4)), MergeOptions("linear"), SPEC, BASE).update
    stored, errors = compressed(update, rank, dtype)
    for name in LAYERS:
        meant = matrix(update, name).double()
        true = float((matrix(stored, name).double() - meant).norm() / meant.norm())
        assert errors.get(name, 0.0) == pytest.approx(true, abs=2e-7, rel=1e-3)
        assert (true < 1e-6) == (rank is None and dtype == torch.float32)


def test_greedy_soup_never_is_worse_than_its_best_ingredient() -> None:
    ingredients = updates(lora(1), lora(2), lora(3), lora(4))
    goal = 0.6 * matrix(ingredients[1], LAYERS[0]) + 0.4 * matrix(ingredients[3], LAYERS[0])
    soup = greedy_soup(ingredients, lambda update: float((matrix(update, LAYERS[0]) - goal).norm()))
    assert soup.chosen == (1, 3)
    assert soup.order[:2] == (1, 3)
    assert soup.loss < min(soup.losses)
    same(matrix(soup.update, LAYERS[0]), (matrix(ingredients[1], LAYERS[0]) + matrix(ingredients[3], LAYERS[0])) / 2)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    (update,) = updates(mixed(1))
    write_update(update, tmp_path / "a", SPEC.fingerprint, base_name="tests/tiny", method="x" * 2000)
    parsed = read_adapter(tmp_path / "a", SPEC)
    assert parsed.file_format == "deltaserve-terms"
    assert parsed.kinds == ("lora", "sparse", "vector")
    (again,) = updates(parsed)
    for name in LAYERS:
        same(matrix(again, name), matrix(update, name))
        same(vector(again, name, "bias", OUT), vector(update, name, "bias", OUT))
    for part in ("gain", "shift"):
        same(vector(again, "model.norm", part, IN), vector(update, "model.norm", part, IN))


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "magic"}, "choose one of linear"),
        ({"method": "soup", "weights": (1.0, 1.0)}, "no option of soup"),
        ({"method": "linear", "density": 0.5}, "belongs to ties, dare"),
        ({"method": "ties", "seed": 1}, "belongs to dare"),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "dare", "density": 1.5}, "at most 1"),
        ({"method": "ema", "momentum": 1.0}, "below 1"),
        ({"method": "linear", "weights": (float("nan"), 1.0)}, "finite"),
        ({"method": "linear", "rank": 0}, "between 1 and 1024"),
        ({"method": "linear", "dtype": "int8"}, "float32"),
        ({"method": "ties", "form": "dense"}, "auto, lora, sparse"),
        ({"method": "greedy-soup"}, "give --data"),
        ({"method": "dare", "seed": -1}, "at least 0"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: dict, told: str) -> None:
    with pytest.raises(MergeRefused, match=told):
        MergeOptions(**arguments)


def test_counts_are_checked() -> None:
    with pytest.raises(MergeRefused, match="at least 2"):
        merge(updates(lora(1)), MergeOptions("ties"), SPEC, BASE)
    with pytest.raises(MergeRefused, match="3 weights for 2"):
        merge(updates(lora(1), lora(2)), MergeOptions("linear", weights=(1.0, 1.0, 1.0)), SPEC, BASE)


def test_scales_on_both_sides_have_no_sum() -> None:
    one = adapter(VectorDelta(LAYERS[0], out_scale=drawn(OUT)))
    other = adapter(VectorDelta(LAYERS[0], in_scale=drawn(IN)))
    with pytest.raises(MergeRefused, match="adapter 3 of the list scales its input and adapter 2 its output"):
        merge(updates(lora(1), one, other), MergeOptions("soup"), SPEC, BASE)
    with pytest.raises(MergeRefused, match="scales its input"):
        merge(updates(one, other), MergeOptions("soup"), SPEC, BASE)
    with pytest.raises(MergeRefused, match="no natural rank"):
        merge(updates(one, other), MergeOptions("ties"), SPEC, BASE)
    merged = merge(updates(one, other), MergeOptions("ties", form="sparse", density=1.0), SPEC, BASE)
    dense = [matrix(part, LAYERS[0]) for part in updates(one, other)]
    same(matrix(merged.update, LAYERS[0]), _untrimmed(dense, (1.0, 1.0)))


def test_what_a_field_alone_tells_is_not_left_out() -> None:
    """Kinds that come later may be told by a field of the adapter or of a delta: they must not be merged by half."""

    @dataclass(frozen=True, slots=True)
    class Later(ParsedAdapter):
        later: object = None

    @dataclass(frozen=True, slots=True)
    class Wider(VectorDelta):
        wider: Tensor | None = None

    plain = lora(1)
    known = {item.name: getattr(plain, item.name) for item in fields(plain)}
    update_of(Later(**known), SPEC, BASE)
    with pytest.raises(MergeRefused, match="the adapter has later"):
        update_of(Later(**known, later=object()), SPEC, BASE)
    for field, value in (("prefix", object()), ("invocation_token_ids", (3, 4))):
        with pytest.raises(MergeRefused, match=f"the adapter has {field}"):
            update_of(replace(plain, **{field: value}), SPEC, BASE)
    update_of(adapter(Wider(LAYERS[0], bias=drawn(OUT))), SPEC, BASE)
    with pytest.raises(MergeRefused, match="has wider"):
        update_of(adapter(Wider(LAYERS[0], wider=drawn(IN))), SPEC, BASE)
    with pytest.raises(MergeRefused, match="has in_bias"):
        update_of(adapter(VectorDelta(LAYERS[0], in_bias=drawn(IN))), SPEC, BASE)
    with pytest.raises(MergeRefused, match="both sides"):
        update_of(adapter(VectorDelta(LAYERS[0], out_scale=drawn(OUT), in_scale=drawn(IN))), SPEC, BASE)
