"""LoRA and sparse methods against hand-written twins: exactly k entries, right gradients, files that say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_trainer.base import Base, linears_of, load_model, spec_of, target_linears
from deltaserve_trainer.errors import RecipeInvalid, TrainingDiverged
from deltaserve_trainer.methods import build_method, load_method
from deltaserve_trainer.methods.lora import LoraMethod
from deltaserve_trainer.methods.selection import largest_entries
from deltaserve_trainer.methods.sparse import SparseMethod
from deltaserve_trainer.recipe import Recipe, resolve_recipe
from deltatest.trainer_base import make_base

FINGERPRINT = "ab" * 32


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = make_base(tmp_path_factory.mktemp("base") / request.param, architecture=request.param)
    return Base(folder, "tiny/base", FINGERPRINT)


def _loss(model: nn.Module, i: int) -> Tensor:
    ids = torch.randint(5, 250, (2, 12), generator=torch.Generator().manual_seed(i))
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _sparse(model: nn.Module, **options: object) -> SparseMethod:
    recipe = resolve_recipe("quick", {"method": "sparse", "sparse": {"selection_steps": 3, **options}})
    method = build_method(
        model, recipe, loss_of_batch=_loss, structure=None, on_selection_step=lambda step, total: None
    )
    assert isinstance(method, SparseMethod)
    return method


def _lora(model: nn.Module, **options: object) -> LoraMethod:
    return LoraMethod.attach(model, resolve_recipe("quick", {"lora": options}))


def _train(method: SparseMethod | LoraMethod, steps: int = 3, rate: float = 1e-2) -> None:
    optimiser = torch.optim.AdamW(list(method.parameters().values()), lr=rate, weight_decay=0.0)
    for i in range(steps):
        _loss(method.model, i).backward()
        optimiser.step()
        optimiser.zero_grad()


def _logits(model: nn.Module) -> Tensor:
    ids = torch.randint(5, 250, (3, 20), generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def _folded(base: Base, folder: Path) -> nn.Module:
    """The base with the file's deltas added to its weights: what the adapter means."""
    model = load_model(base.folder)
    spec = spec_of(model, base)
    for delta in read_adapter(folder, spec).deltas:
        linear = spec.linears[delta.module]
        dense = torch.zeros(linear.out_features, linear.in_features)
        if isinstance(delta, LoraDelta):
            dense += delta.scaling * delta.b.float() @ delta.a.float()
        else:
            dense[delta.rows.long(), delta.cols.long()] += delta.values.float()
        weight = model.get_submodule(delta.module).get_parameter("weight")
        weight.data += dense.T if linear.transposed else dense
    return model


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    share=st.floats(0.01, 1),
    levels=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_exactly_k_of_the_largest_whatever_the_ties(sizes: list[int], share: float, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {f"l{i}": torch.randint(0, levels, (n, 2), generator=generator).float() for i, n in enumerate(sizes)}
    k = max(1, int(share * sum(s.numel() for s in scores.values())))
    picked = largest_entries(scores, k)
    assert sum(len(index) for index in picked.values()) == k
    assert all(len(index.unique()) == len(index) for index in picked.values())
    assert all(bool((index[1:] > index[:-1]).all()) for index in picked.values())
    chosen = torch.cat([scores[name].flatten()[index] for name, index in picked.items()])
    everything = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values
    assert torch.equal(chosen.sort(descending=True).values, everything[:k])


def test_scores_that_are_not_numbers_stop_the_selection() -> None:
    with pytest.raises(TrainingDiverged, match="in bad"):
        largest_entries({"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")])}, 2)


def test_gradient_selection_takes_the_largest_summed_squares(base: Base) -> None:
    k = 500
    method = _sparse(load_model(base.folder), num_entries=k, selection="gradient")
    twin = load_model(base.folder)
    weights = {name: linear.get_parameter("weight").requires_grad_(True) for name, linear in linears_of(twin).items()}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for i in range(3):
        grads = torch.autograd.grad(_loss(twin, i), list(weights.values()))
        for name, grad in zip(weights, grads, strict=True):
            sums[name] += grad**2
    threshold = torch.cat([s.flatten() for s in sums.values()]).topk(k).values[-1]
    assert method.num_entries() == k
    for name, weight in weights.items():
        score = sums[name] if isinstance(twin.get_submodule(name), nn.Linear) else sums[name].T
        expected = torch.nonzero((score >= threshold).flatten()).flatten()
        found = method.structure().get(f"index.{name}", torch.empty(0, dtype=torch.int64))
        assert torch.equal(found, expected), name
        assert weight.shape == sums[name].shape


def test_magnitude_selection_takes_what_moved_and_puts_the_base_back(base: Base) -> None:
    before = _logits(load_model(base.folder))
    method = _sparse(load_model(base.folder), density=0.03, selection="magnitude")
    available = sum(weight.get_parameter("weight").numel() for weight in linears_of(load_model(base.folder)).values())
    assert method.num_entries() == round(0.03 * available)
    assert torch.equal(_logits(method.model), before)


@pytest.mark.parametrize("selection", ["gradient", "magnitude"])
def test_the_mask_never_drifts_and_the_base_never_changes(base: Base, selection: str, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in load_model(base.folder).named_parameters()}
    method = _sparse(load_model(base.folder), num_entries=333, selection=selection)
    index = {name: tensor.clone() for name, tensor in method.structure().items()}
    _train(method)
    assert {n: t.tolist() for n, t in method.structure().items()} == {n: t.tolist() for n, t in index.items()}
    base_parameters = {n.replace(".linear.", "."): p for n, p in method.model.named_parameters() if "values" not in n}
    assert base_parameters.keys() == before.keys()
    for name, parameter in base_parameters.items():
        assert torch.equal(parameter, before[name]), name
    method.save(tmp_path, base, "float32")
    deltas = read_adapter(tmp_path, spec_of(load_model(base.folder), base)).deltas
    assert sum(delta.num_entries for delta in deltas if isinstance(delta, SparseDelta)) == 333
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]


def test_sparse_gradients_equal_those_of_the_dense_weight(base: Base) -> None:
    method = _sparse(load_model(base.folder), num_entries=400)
    _train(method, steps=2)
    _loss(method.model, 7).backward()
    twin = load_model(base.folder)
    spec = spec_of(twin, base)
    for name, parameter in method.parameters().items():
        module = name.removeprefix("values.")
        weight = twin.get_submodule(module).get_parameter("weight")
        view = weight.data.T if spec.linears[module].transposed else weight.data
        index, width = method.structure()[f"index.{module}"], spec.linears[module].in_features
        view[index // width, index % width] += parameter.detach()
        weight.requires_grad_(True)
    _loss(twin, 7).backward()
    for name, parameter in method.parameters().items():
        module = name.removeprefix("values.")
        grad = twin.get_submodule(module).get_parameter("weight").grad
        assert grad is not None
        assert parameter.grad is not None
        dense = grad.T if spec.linears[module].transposed else grad
        expected = dense.reshape(-1)[method.structure()[f"index.{module}"]]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_sparse_file_folded_equals_the_trainer(base: Base, tmp_path: Path) -> None:
    method = _sparse(load_model(base.folder), num_entries=700)
    plain = _logits(load_model(base.folder))
    _train(method)
    method.save(tmp_path, base, "float32")
    trained = _logits(method.model)
    assert float((trained - plain).abs().max()) > 1e-3
    torch.testing.assert_close(_logits(_folded(base, tmp_path)), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(_logits(load_method(load_model(base.folder), tmp_path, base).model), trained)
    with method.disabled():
        assert torch.equal(_logits(method.model), plain)


def test_sparse_state_restored_from_its_structure_is_the_same(base: Base) -> None:
    method = _sparse(load_model(base.folder), num_entries=50)
    _train(method)
    again = SparseMethod.restore(load_model(base.folder), method.structure())
    for name, parameter in again.parameters().items():
        parameter.data.copy_(method.parameters()[name])
    assert torch.equal(_logits(again.model), _logits(method.model))


def test_autocast_computes_in_bfloat16(base: Base) -> None:
    method = _sparse(load_model(base.folder), num_entries=50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _loss(method.model, 0)
    loss.backward()
    exact = float(_loss(method.model, 0).detach())
    assert float(loss.detach()) != exact
    assert float(loss.detach()) == pytest.approx(exact, abs=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters().values())


def test_lora_file_loads_in_peft_and_folded_and_equals_the_trainer(base: Base, tmp_path: Path) -> None:
    from peft import PeftModel

    some = next(iter(linears_of(load_model(base.folder))))
    method = _lora(load_model(base.folder), rank=4, alpha=6, rslora=True, rank_pattern={some.replace(".", r"\."): 7})
    plain = _logits(load_model(base.folder))
    _train(method)
    method.save(tmp_path, base, "float32")
    trained = _logits(method.model)
    assert float((trained - plain).abs().max()) > 1e-3
    peft = PeftModel.from_pretrained(load_model(base.folder), str(tmp_path))
    torch.testing.assert_close(_logits(peft), trained)
    torch.testing.assert_close(_logits(_folded(base, tmp_path)), trained, rtol=0, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "tiny/base"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(base.folder) not in json.dumps(config)


def test_lora_training_equals_a_reference_loop(base: Base) -> None:
    method = _lora(load_model(base.folder), rank=3, alpha=9)
    start = {name: p.detach().clone() for name, p in method.parameters().items()}
    _train(method, steps=4)
    twin = load_model(base.folder)
    factors: dict[str, list[Tensor]] = {}
    for name, value in start.items():
        module, _, side = name.removeprefix("base_model.model.").partition(".lora_")
        factors.setdefault(module, []).append(value.requires_grad_(True))
        assert side == f"{'AB'[len(factors[module]) - 1]}.default.weight"
    for module, (a, b) in factors.items():
        twin.get_submodule(module).register_forward_hook(_add_low_rank(a, b, 9 / 3))
    optimiser = torch.optim.AdamW(list(start.values()), lr=1e-2, weight_decay=0.0)
    for i in range(4):
        _loss(twin, i).backward()
        optimiser.step()
        optimiser.zero_grad()
    for name, parameter in method.parameters().items():
        torch.testing.assert_close(parameter.detach(), start[name].detach(), rtol=1e-3, atol=1e-5)


def _add_low_rank(a: Tensor, b: Tensor, scaling: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda module, inputs, output: output + scaling * (inputs[0] @ a.T) @ b.T


def test_targets_are_checked_by_name(base: Base) -> None:
    model = load_model(base.folder)
    every = linears_of(model)
    leaf = next(iter(every)).rsplit(".", 1)[-1]
    assert set(target_linears(model, (leaf,))) == {name for name in every if name.endswith("." + leaf)}
    with pytest.raises(RecipeInvalid, match="nothing_like_it"):
        target_linears(model, ("nothing_like_it",))
    with pytest.raises(RecipeInvalid, match="pattern"):
        _lora(model, rank_pattern={"nothing_like_it": 3})
    with pytest.raises(RecipeInvalid, match="entries asked for"):
        _sparse(load_model(base.folder), num_entries=10**9)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        ({"learning_rat": 1e-3}, "learning_rat"),
        ({"lora.rnak": 4}, "lora.rnak"),
        ({"epochs": -1}, "epochs"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"method": "dora"}, "method"),
        ({"method": "sparse", "sparse": {"density": 0.1, "num_entries": 4}}, "exactly one"),
        ({"method": "sparse", "lora": {"rank": 4}}, "no effect"),
        ({"lora": 3}, "expected keys"),
        ({"seed": 1, "seed.x": 2}, "value of its own"),
    ],
)
def test_recipes_refuse_what_they_do_not_know(overrides: dict[str, object], fragment: str) -> None:
    with pytest.raises(RecipeInvalid, match=fragment):
        resolve_recipe("quick", overrides)


def test_recipes_are_complete_frozen_and_come_back_from_their_json() -> None:
    for preset in ("quick", "balanced", "quality"):
        for method in ("lora", "sparse"):
            recipe = resolve_recipe(preset, {"method": method})
            assert Recipe.model_validate_json(recipe.to_json()) == recipe
    recipe = resolve_recipe("quick", {"lora.rank": 5, "lora": {"alpha": 7}})
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha) == (5, 7)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    with pytest.raises(RecipeInvalid, match="preset"):
        resolve_recipe("fastest")
