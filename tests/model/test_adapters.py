"""Adapter terms on every linear of every architecture, against PEFT and against folded weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.engine.batch import ScheduledPart
from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import LoraTables, SparseTables
from deltatest.paged_driver import PagedDriver
from deltatest.tiny_models import ARCHITECTURES, VOCAB_SIZE, build_tiny_model

torch.set_num_threads(1)

LENGTHS = (30, 9, 52, 1)
Factors = dict[str, tuple[Tensor, Tensor]]


def load(folder: Path) -> BaseModel:
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


def random_factors(base: BaseModel, rank: int, seed: int) -> Factors:
    """A [r, in] and B [out, r] for every linear, strong enough to change every logit."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, spec.in_features, generator=generator) * 0.2,
            torch.randn(spec.out_features, rank, generator=generator) * 0.2,
        )
        for name, spec in base.spec.linears.items()
    }


def fill_lora(tables: LoraTables, base: BaseModel, slot: int, factors: Factors) -> None:
    for index, name in enumerate(base.linears):
        a, b = factors[name]
        tables.set(index, slot, a, b.t().contiguous())


def peft_logits(folder: Path, factors: Factors, scaling: float, prompts: list[list[int]]) -> list[Tensor]:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    rank = next(iter(factors.values()))[0].shape[0]
    is_conv = model.config.model_type == "gpt2"
    config = LoraConfig(
        r=rank, lora_alpha=scaling * rank, target_modules=list(factors), fan_in_fan_out=is_conv, lora_dropout=0.0
    )
    peft_model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer = peft_model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
        return [peft_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts]


@dataclass
class Setting:
    base: BaseModel
    folder: Path
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = build_tiny_model(request.param, tmp_path_factory.mktemp("base") / request.param)
    return Setting(load(folder), folder, random_prompts())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load(build_tiny_model("smollm3", tmp_path_factory.mktemp("base") / "smollm3"))


def test_lora_on_all_linears_equals_peft_and_folded_weights_beside_others(setting: Setting) -> None:
    base, prompts = setting.base, setting.prompts
    first, second = random_factors(base, 4, 1), random_factors(base, 7, 2)
    tables = LoraTables(len(base.linears), 3, "cpu")
    fill_lora(tables, base, 2, first)
    fill_lora(tables, base, 0, second)
    driver = PagedDriver(base, DeltaTables(tables, SparseTables(len(base.linears), 3, "cpu")))
    parts = [(ScheduledPart(2, 0.5, 0.5),), (), (ScheduledPart(0),), (ScheduledPart(2, 0.5, 0.5),)]
    found = driver.logits(prompts, parts, chunk=11)
    plain = driver.logits(prompts)

    wanted = [peft_logits(setting.folder, first, 0.5, [prompts[i]])[0] for i in (0, 3)]
    assert (found[0] - wanted[0]).abs().max() < 1e-4
    assert (found[3] - wanted[1]).abs().max() < 1e-4
    assert (found[2] - peft_logits(setting.folder, second, 1.0, [prompts[2]])[0]).abs().max() < 1e-4
    assert torch.allclose(found[1], plain[1], atol=1e-5)
    for i in (0, 2, 3):
        assert (found[i] - plain[i]).abs().max() > 1e-2, "an adapter without effect proves nothing"

    folded = base.folded_logits(torch.tensor(prompts[0]), deltas_of(first, lambda _: 0.5))
    assert (found[0] - folded).abs().max() < 1e-4


def deltas_of(factors: Factors, scale: Callable[[str], float]) -> dict[str, Callable[[], Tensor]]:
    def make(name: str) -> Callable[[], Tensor]:
        a, b = factors[name]
        return lambda: scale(name) * (b @ a)

    return {name: make(name) for name in factors}


def test_scale_runs_over_depth(llama: BaseModel) -> None:
    factors = random_factors(llama, 3, 1)
    tables = LoraTables(len(llama.linears), 1, "cpu")
    fill_lora(tables, llama, 0, factors)
    ids = random_prompts()[0]
    found = PagedDriver(llama, DeltaTables(tables)).logits([ids], [(ScheduledPart(0, 0.25, 1.25),)])[0]
    scales = {0: 0.25, 1: 0.75, 2: 1.25}
    layers = {name: spec.layer for name, spec in llama.spec.linears.items()}
    wanted = llama.folded_logits(torch.tensor(ids), deltas_of(factors, lambda name: scales[layers[name]]))
    assert (found - wanted).abs().max() < 1e-4


def test_sparse_and_lora_in_one_binding_equal_folded_weights(llama: BaseModel) -> None:
    factors = random_factors(llama, 3, 1)
    lora, sparse = LoraTables(len(llama.linears), 2, "cpu"), SparseTables(len(llama.linears), 2, "cpu")
    fill_lora(lora, llama, 0, factors)
    dense: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(4)
    for index, name in enumerate(llama.linears):
        spec = llama.spec.linears[name]
        values = torch.randn(spec.out_features, spec.in_features, generator=generator)
        dense[name] = torch.where(torch.rand(values.shape, generator=generator) < 0.05, values, torch.zeros(()))
        csr = dense[name].to_sparse_csr()
        sparse.set(index, 1, csr.crow_indices().int(), csr.col_indices().int(), csr.values())
    ids = random_prompts()[0]
    driver = PagedDriver(llama, DeltaTables(lora, sparse))
    both, only_sparse = driver.logits([ids, ids], [(ScheduledPart(0), ScheduledPart(1, 0.5, 0.5)), (ScheduledPart(1),)])
    folded = llama.folded_logits(torch.tensor(ids), {name: (lambda n=name: dense[n]) for name in dense})
    assert (only_sparse - folded).abs().max() < 1e-4
    product = deltas_of(factors, lambda _: 1.0)
    summed = {name: (lambda n=name: product[n]() + 0.5 * dense[n]) for name in dense}
    assert (both - llama.folded_logits(torch.tensor(ids), summed)).abs().max() < 1e-4


def test_a_part_joins_at_its_start_position(llama: BaseModel) -> None:
    tables = LoraTables(len(llama.linears), 1, "cpu")
    fill_lora(tables, llama, 0, random_factors(llama, 3, 1))
    driver = PagedDriver(llama, DeltaTables(tables))
    ids = random_prompts()[0]
    late = (ScheduledPart(0, start_position=12),)
    whole, chunked = driver.logits([ids], [late])[0], driver.logits([ids], [late], chunk=12)[0]
    plain, adapted = driver.logits([ids, ids], [(), (ScheduledPart(0),)])
    assert torch.allclose(whole[:12], plain[:12], atol=1e-5)
    assert torch.allclose(whole, chunked, atol=1e-4)
    assert (whole[12:] - plain[12:]).abs().max() > 1e-2
    # Keys and values before the start are the base's, so the rows after it are not the adapter's alone either.
    assert (whole[12:] - adapted[12:]).abs().max() > 1e-2


def test_company_does_not_change_a_rows_answer(llama: BaseModel) -> None:
    """Forty sequences over nine bindings, decoded greedily: everyone answers as alone."""
    from deltatest.paged_driver import Running

    tables = LoraTables(len(llama.linears), 8, "cpu")
    for slot in range(8):
        fill_lora(tables, llama, slot, random_factors(llama, 1 + 3 * slot, slot))
    driver = PagedDriver(llama, DeltaTables(tables), num_blocks=128)
    generator = torch.Generator().manual_seed(9)
    running = [
        Running(
            torch.randint(3, VOCAB_SIZE, (3 + i % 19,), generator=generator).tolist(),
            arrival=i // 5,
            parts=() if i % 9 == 8 else (ScheduledPart(i % 9),),
        )
        for i in range(40)
    ]
    together = driver.greedy(running, 8, budget=64)
    alone = [driver.greedy([Running(r.prompt, parts=r.parts)], 8)[0] for r in running]
    assert together == alone
