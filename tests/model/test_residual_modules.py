"""Residual modules against transformers with hooks, alone and among all kinds; bits where nothing may be felt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from deltaserve.deltas.folded import FoldedAdapter
from deltaserve.deltas.modules import parallel_points, plain_modules
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.model import weight
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.formats import read_adapter
from deltatest.apart_adapters import hooked_logits, make_bottleneck, make_dense
from deltatest.mixed_batch import MixedBatch, distance, prompts
from deltatest.of_kind import all_of
from deltatest.peft_adapters import make_bitfit, make_gates, make_sparse
from deltatest.real_engine import fold_folder
from deltatest.tiny_models import VOCAB_SIZE, build_tiny_model, save_random, tiny_config

torch.set_num_threads(1)

IDS = prompts((21, 9, 30, 1, 17, 12, 8, 15), VOCAB_SIZE)
KINDS = ("houlsby", "parallel", "gray-box", "everywhere")


@dataclass
class Setting:
    arch: str
    base: BaseModel
    model: nn.Module
    folders: dict[str, Path]
    adapters: dict[str, FoldedAdapter]

    def logits(self, kind: str, ids: list[int], strength: float = 1.0) -> Tensor:
        return hooked_logits(self.model, self.arch, deltas_of(self.folders[kind], self.base), ids, strength)


def deltas_of(folder: Path, base: BaseModel) -> list[BottleneckDelta]:
    return all_of(BottleneckDelta, read_adapter(folder, base.spec).deltas)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    root = tmp_path_factory.mktemp("modules")
    folder = build_tiny_model(request.param, root / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=root / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    folders = {
        "houlsby": make_bottleneck(base.spec, root / "houlsby", ("attn_out", "mlp_out"), activation="gelu", seed=1),
        "parallel": make_bottleneck(
            base.spec, root / "parallel", ("mlp_out",), parallel=True, seed=2, scale=4, std=0.1
        ),
        "gray-box": make_bottleneck(base.spec, root / "gray-box", ("embed_out", "final_hidden"), std=0.3),
        "everywhere": make_bottleneck(base.spec, root / "everywhere", parallel=True, seed=3, std=0.15),
        "sparse": make_sparse(base.spec, root / "sparse", targets=[n.rsplit(".", 1)[-1] for n in base.linears]),
        "bitfit": make_bitfit(base.spec, root / "bitfit"),
        "gates": make_gates(base.spec, root / "gates"),
    }
    adapters = {kind: fold_folder(path, base) for kind, path in folders.items()}
    return Setting(request.param, base, model, folders, adapters)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_equals_hooks_on_transformers(setting: Setting, kind: str) -> None:
    batch = MixedBatch(setting.base).load_all({kind: setting.adapters[kind]})
    (plain,) = batch.logits(IDS[:1], [None])
    (found,) = batch.logits(IDS[:1], [kind], chunk=8)
    wanted = setting.logits(kind, IDS[0])
    assert distance(wanted, plain) > 1e-1, "an adapter without effect proves nothing"
    assert distance(found, wanted) < 1e-4


def test_all_kinds_in_one_batch_equal_hooks_and_change_nobody_else(setting: Setting) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    names: list[str | tuple[str, float] | None] = [None, "sparse", "bitfit", "gates", *KINDS]
    found = batch.logits(IDS, names, chunk=7)
    for ids, name, logits in zip(IDS, names, found, strict=True):
        if name in KINDS:
            assert distance(logits, setting.logits(str(name), ids)) < 1e-4, name
    for i, name in enumerate(names):  # company is not felt, to the bit
        assert torch.equal(found[i], batch.logits([IDS[i]], [name], chunk=7)[0]), name
    others = {name: setting.adapters[name] for name in ("sparse", "bitfit", "gates")}
    bare = MixedBatch(setting.base).load_all(others).logits(IDS[:4], [None, *others], chunk=7)
    for logits, without in zip(found, bare, strict=False):
        assert torch.equal(logits, without)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_is_that_of_the_output(setting: Setting, kind: str) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    plain, nothing, half = batch.logits([IDS[0]] * 3, [None, (kind, 0.0), (kind, 0.5)])
    assert torch.equal(plain, nothing)
    assert distance(half, setting.logits(kind, IDS[0], 0.5)) < 1e-4
    assert distance(half, plain) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_evicted_and_read_again_it_answers_to_the_bit(setting: Setting, kind: str, tmp_path: Path) -> None:
    setting.adapters[kind].save(tmp_path / "folded")
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    used = batch.pool.used_bytes
    (before,) = batch.logits(IDS[:1], [kind])
    batch.reload(kind, tmp_path / "folded")
    assert batch.pool.used_bytes == used
    assert torch.equal(batch.logits(IDS[:1], [kind])[0], before)
    batch.pool.release(batch.slots.pop(kind))  # and after it nothing is left of it
    batch.slots["empty"] = batch.pool.reserve("empty", 0)
    assert torch.equal(*batch.logits(IDS[:1] * 2, ["empty", None]))


def test_folded_mode_is_the_hooked_model_too(setting: Setting) -> None:
    for kind in KINDS:
        adapter = read_adapter(setting.folders[kind], setting.base.spec)
        modules, parallel = plain_modules(adapter), parallel_points(adapter)
        found = setting.base.folded_logits(torch.tensor(IDS[0]), {}, modules=modules, parallel=parallel)
        assert distance(found, setting.logits(kind, IDS[0])) < 1e-4


def test_modules_of_several_adapters_run_in_the_order_of_the_binding(setting: Setting) -> None:
    batch = MixedBatch(setting.base).load_all(setting.adapters)
    parts = tuple(ScheduledPart(batch.slots[name], scale, scale) for name, scale in (("houlsby", 1.0), ("sparse", 1.0)))
    (together,) = batch.driver.logits([IDS[0]], [parts])
    (turned,) = batch.driver.logits([IDS[0]], [parts[::-1]])
    assert torch.equal(together, turned)  # one module at a point: the order of other kinds is fixed
    chained = tuple(ScheduledPart(batch.slots[name], 1.0, 1.0) for name in ("houlsby", "everywhere"))
    found, other = batch.driver.logits([IDS[0]] * 2, [chained, chained[::-1]])
    assert distance(found, other) > 1e-3
    (alone,) = batch.driver.logits([IDS[0]], [chained])
    assert torch.equal(found, alone)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "gpt-neox", "granite", "olmo2", "phi3", "qwen3", "smollm3"])
def test_points_are_where_transformers_has_the_sublayers(arch: str, tmp_path: Path) -> None:
    """One module at each point of architectures that are made in other ways."""
    folder = build_tiny_model(arch, tmp_path / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=tmp_path / "cache")
    assert len(base.spec.points) == 4 * base.spec.num_layers + 2
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    adapter = make_bottleneck(base.spec, tmp_path / "adapter", parallel=True, std=0.15)
    batch = MixedBatch(base).load_all({"it": fold_folder(adapter, base)})
    wanted = hooked_logits(model, arch, deltas_of(adapter, base), IDS[1])
    assert distance(batch.logits(IDS[1:2], ["it"])[0], wanted) < 1e-4


def test_where_attention_and_mlp_read_one_tensor_only_outputs_have_points(tmp_path: Path) -> None:
    folder = save_random(tiny_config("phi", num_key_value_heads=4, partial_rotary_factor=0.5), tmp_path / "base")
    base = load_base(folder, dtype=torch.float32, cache_dir=tmp_path / "cache")
    inputs = {point for point in base.spec.points if point.endswith("_in")}
    assert not inputs
    assert len(base.spec.points) == 2 * base.spec.num_layers + 2
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    adapter = make_bottleneck(base.spec, tmp_path / "adapter", parallel=True)
    batch = MixedBatch(base).load_all({"it": fold_folder(adapter, base)})
    wanted = hooked_logits(model, "phi", deltas_of(adapter, base), IDS[1])
    assert distance(batch.logits(IDS[1:2], ["it"])[0], wanted) < 1e-4


def test_what_a_sublayer_is_fed_may_be_the_residual_stream_itself(tmp_path: Path) -> None:
    """OPT with its norms behind the sublayers: a module at an input must not leak into the stream."""
    config = tiny_config("opt", do_layer_norm_before=False, ffn_dim=96, word_embed_proj_dim=64)
    base = load_base(save_random(config, tmp_path / "base"), dtype=torch.float32, cache_dir=tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    adapter = make_bottleneck(base.spec, tmp_path / "adapter", ("attn_in", "attn_out"), parallel=True)
    batch = MixedBatch(base).load_all({"it": fold_folder(adapter, base)})
    wanted = hooked_logits(model, "opt", deltas_of(adapter, base), IDS[1])
    assert distance(batch.logits(IDS[1:2], ["it"])[0], wanted) < 1e-4


def test_products_that_add_onto_the_stream_leave_all_other_rows_their_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fused layers on a GPU call them: bf16, weights not reordered, one rounding for base product and residual."""
    monkeypatch.setattr(weight, "_prepack", lambda _: None)
    base = load_base(build_tiny_model("llama", tmp_path / "base"), dtype=torch.bfloat16, cache_dir=tmp_path / "cache")
    folders = {
        "modules": make_bottleneck(base.spec, tmp_path / "modules", ("attn_out", "mlp_in", "mlp_out"), parallel=True),
        "dense": make_dense(base.spec, tmp_path / "dense", "delta"),
        "sparse": make_sparse(base.spec, tmp_path / "sparse", targets=["o_proj", "down_proj"]),
    }
    batch = MixedBatch(base).load_all({name: fold_folder(path, base) for name, path in folders.items()})
    parts = [(), *((ScheduledPart(slot, 1.0, 1.0),) for slot in batch.slots.values())]
    sequences = [ScheduledSequence(i, (5,) * 4, 0, [i], part) for i, part in enumerate(parts)]
    runner = batch.driver.runner
    ctx, _, _ = runner._prepare(sequences, np.full(4, 4), np.zeros(4, dtype=np.int64))
    assert ctx.apart is not None
    # Rows of the base, of modules, of a difference with biases and norms (vectors), of a sparse delta.
    others, with_modules, with_vectors = [*range(4), *range(12, 16)], list(range(4, 8)), list(range(8, 12))
    for first, last in (("self_attn.q_proj", "self_attn.o_proj"), ("mlp.gate_proj", "mlp.down_proj")):
        inlet, outlet = (base.linear(f"model.layers.1.{name}").group for name in (first, last))
        fed, rows, stream = (torch.randn(16, n).bfloat16() for n in (64, outlet.weight.shape[1], 64))
        inlet.apply(fed, ctx)  # keeps what parallel modules read
        alone = outlet.apply(rows, ctx)
        found = outlet.apply(rows, ctx, stream.clone())
        bare = outlet.apply(rows, replace(ctx, apart=None, vectors=None), stream.clone())
        assert torch.equal(found[others], bare[others])
        assert torch.equal(found[with_modules], stream[with_modules] + alone[with_modules])
        assert distance(found[with_vectors].float(), (stream + alone)[with_vectors].float()) < 0.1
        changed = distance(found[with_vectors].float(), bare[with_vectors].float()) > 0.1
        assert changed == (last == "self_attn.o_proj"), "the difference changes every second linear"
        assert not torch.equal(alone[others] + stream[others], bare[others]), "one rounding is not two"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_company_is_not_felt_where_sums_are_rounded(dtype: torch.dtype, tmp_path: Path) -> None:
    base = load_base(build_tiny_model("llama", tmp_path / "base"), dtype=dtype, cache_dir=tmp_path / "cache")
    folders = {
        "houlsby": make_bottleneck(base.spec, tmp_path / "houlsby", ("attn_out", "mlp_out")),
        "everywhere": make_bottleneck(base.spec, tmp_path / "everywhere", parallel=True, seed=3),
        "sparse": make_sparse(base.spec, tmp_path / "sparse"),
    }
    adapters = {kind: fold_folder(path, base) for kind, path in folders.items()}
    batch = MixedBatch(base).load_all(adapters)
    names: list[str | tuple[str, float] | None] = [None, *folders]
    found = batch.logits(IDS[:4], names)
    for ids, name, logits in zip(IDS, names, found, strict=False):
        assert torch.equal(logits, batch.logits([ids], [name])[0]), name
    plain, nothing = batch.logits([IDS[0]] * 2, [None, ("everywhere", 0.0)])
    assert torch.equal(plain, nothing)
