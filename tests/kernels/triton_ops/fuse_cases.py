"""Fused modules and layers of a base over the Triton operators, with weights as a GPU keeps them; test_interpreter.py.

The interpreter's results are as exact as the definition's, so a step with fused modules is held to one without.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model import base as base_module
from deltaserve.model import fuse_layer, weight
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.fuse import FusedAttention, FusedGated, FusedNorm
from deltaserve.model.fuse_layer import FusedLayer
from deltaserve.model.kv_cache import KVCache
from deltaserve_kernels import LoraTables, paged_attention, use_backend
from deltaserve_kernels.triton_ops import attention, entry, guard
from deltatest.apart_adapters import make_bottleneck
from deltatest.graph_rig import GraphRig
from deltatest.mixed_batch import MixedBatch
from deltatest.peft_adapters import make_bitfit, make_gates
from deltatest.real_engine import fold_folder
from deltatest.tape import Tape
from deltatest.tiny_models import build_tiny_model, save_random, tiny_config
from deltatest.vocabulary_adapters import make_vocabulary_adapter

torch.set_num_threads(1)
KINDS = {FusedNorm: "norm", FusedGated: "gated", FusedAttention: "attention", FusedLayer: "layer"}
FUSED = {
    "llama": {"norm", "gated", "attention", "layer"},
    "qwen2": {"norm", "gated", "attention", "layer"},
    "gemma2": {"norm", "gated", "attention"},  # normalises what attention and MLP return
    "qwen3": {"norm", "gated"},  # normalises q and k
    "gpt2": set(),
}
# Of one layer without adapters, in order; a product with its add is one.
LAYER = [
    "rms_norm_rows", "aten::linear", "rotate_and_store", "decode", "combine", "aten::addmm_",
    "rms_norm_rows", "aten::linear", "gated_rows", "aten::addmm_",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    """As on a GPU: by Triton, weights in their own order, fused for Triton's operators. Not what takes the interpreter
    its time and has cases of its own: attention, and the check of a base at load."""
    monkeypatch.setattr(weight, "_prepack", lambda _: None)
    monkeypatch.setattr(base_module, "verify", lambda *_: None)
    monkeypatch.setattr(entry, "paged_attention", attend_by_definition)
    before = use_backend("triton")
    yield
    use_backend(before)


def attend_by_definition(*args, **kwargs):
    return paged_attention(*args, **kwargs, backend="reference")


def load(folder, dtype=torch.float32) -> BaseModel:
    return load_base(folder, dtype=dtype, cache_dir=folder / "cache")


def small_llama(folder, layers=2) -> BaseModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    return load(save_random(tiny_config("llama", num_hidden_layers=layers, **sizes), folder))


def kinds_of(base: BaseModel) -> set[str]:
    forwards = (module.__dict__.get("forward") for module in base._model.modules())
    return {KINDS[type(forward)] for forward in forwards if type(forward) in KINDS}


def steps(base: BaseModel, lora=None) -> torch.Tensor:
    """A step of a prompt and a chunk, then one token each; the second sequence has adapter 0."""
    runner = ModelRunner(base, KVCache(base.kv_layout, 6, "cpu"), DeltaTables(lora))
    parts = (ScheduledPart(0),) if lora is not None else ()
    first = [ScheduledSequence(0, (40, 41, 42, 43, 44), 0, (0,)), ScheduledSequence(1, (7, 8), 0, (3,), parts)]
    second = [ScheduledSequence(0, (5,), 5, (0,)), ScheduledSequence(1, (6,), 2, (3,), parts)]
    return torch.cat([runner.execute(first).clone(), runner.execute(second)])


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_and_that_it_changes_nothing(name, tmp_path, monkeypatch):
    folder = build_tiny_model(name, tmp_path)
    base = load(folder)
    # A forward that was fused may lie below one that adapters change norms by.
    assert kinds_of(base) == FUSED[name]
    found = steps(base)
    use_backend("reference")
    aside = steps(base)
    use_backend("triton")
    monkeypatch.setattr(base_module, "fuse", lambda _: None)
    plain = load(folder)
    assert not kinds_of(plain)
    wanted = steps(plain)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    use_backend("reference")
    assert torch.equal(aside, steps(plain)), "the definition does not step aside"


def test_half_precision_is_as_near_to_fp32_as_unfused(tmp_path, monkeypatch):
    folder = build_tiny_model("llama", tmp_path)
    exact, fused = steps(load(folder)), steps(load(folder, torch.float16))
    monkeypatch.setattr(base_module, "fuse", lambda _: None)
    plain = steps(load(folder, torch.float16))
    assert (fused - exact).norm() <= 1.5 * (plain - exact).norm()


def test_adapters_add_onto_the_stream(tmp_path, monkeypatch):
    base = small_llama(tmp_path, layers=1)
    lora = LoraTables(len(base.linears), 1)
    for i, name in enumerate(base.linears):
        spec = base.spec.linears[name]
        lora.set(i, 0, torch.randn(3, spec.in_features) * 0.3, torch.randn(3, spec.out_features) * 0.3)
    found, alone = steps(base, lora), steps(base)  # rows: each sequence's last, of one step and the next
    monkeypatch.setattr(base_module, "fuse", lambda _: None)
    plain = load(tmp_path)
    wanted = steps(plain, lora)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert (found[[1, 3]] - alone[[1, 3]]).norm() > 0.1 * alone[[1, 3]].norm()
    torch.testing.assert_close(found[[0, 2]], alone[[0, 2]])


def test_residual_modules_have_the_sublayer_s_output_to_themselves(tmp_path, monkeypatch):
    """At the ends of fused layers, whose products add onto the stream."""
    base = small_llama(tmp_path, layers=1)
    adapter = fold_folder(make_bottleneck(base.spec, tmp_path / "modules", parallel=True), base)

    def rows(base: BaseModel) -> list[torch.Tensor]:
        batch = MixedBatch(base).load_all({"it": adapter})
        return batch.logits(ids, ["it", None])

    ids = [[40, 41, 42], [7, 8, 9]]
    found, without = rows(base), MixedBatch(base).logits(ids, [None, None])
    assert torch.equal(found[1], without[1])
    assert (found[0] - without[0]).norm() > 0.1 * without[0].norm()
    monkeypatch.setattr(base_module, "fuse", lambda _: None)
    wanted = rows(load(tmp_path))
    assert (found[0] - wanted[0]).norm() <= 1e-5 * wanted[0].norm()


@pytest.mark.parametrize("kind", ["bitfit", "gates", "tokens-apart"])
def test_prompts_with_vectors_or_a_vocabulary_of_their_own_run_by_triton(kind, tmp_path):
    """Eagerly, in fused layers, in one step with a prompt of the base, whose bits stay; held to the definition."""
    base = small_llama(tmp_path, layers=1)
    if kind == "tokens-apart":
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        make_vocabulary_adapter(kind, model, tmp_path / kind, target="q_proj", norm="norm")
    else:
        (make_bitfit if kind == "bitfit" else make_gates)(base.spec, tmp_path / kind)
    batch = MixedBatch(base).load_all({kind: fold_folder(tmp_path / kind, base)})
    ids = [[40, 41, 42], [7, 8]]
    found, without = batch.logits(ids, [kind, None]), batch.logits(ids, [None, None])
    at_zero = batch.logits(ids, [(kind, 0.0), None])
    use_backend("reference")
    wanted = batch.logits(ids, [kind, None])
    assert (found[0] - wanted[0]).norm() <= 1e-5 * wanted[0].norm()
    assert (found[0] - without[0]).norm() > 0.01 * without[0].norm()
    assert torch.equal(found[1], without[1])
    assert torch.equal(at_zero[0], without[0])


def test_a_layer_is_ten_launches_and_a_step_few_more(tmp_path, monkeypatch):
    """What a GPU spends on a step of the base beside its bytes."""
    monkeypatch.setattr(guard, "may_look", lambda tensor: False)
    monkeypatch.setattr(entry, "paged_attention", attention.paged_attention)
    tape = Tape()
    GraphRig(small_llama(tmp_path), capture=tape, max_seqs=1, row_counts=[1], keys=[])
    first = tape.launches.index("rms_norm_rows")
    assert tape.launches[first : first + 20] == LAYER * 2
    outside = tape.launches[:first] + tape.launches[first + 20 :]
    # Embedding and its copy, angles; the last norm, the head, logits in fp32.
    assert len(outside) <= 11, outside


def test_the_tensor_a_layer_is_given_stays_as_it_was(tmp_path):
    """Somebody else may hold it. What a layer returned itself, the next one changes."""
    base = small_llama(tmp_path)
    given = []
    for layer in (module for module in base._model.modules() if isinstance(fuse_layer._fused(module), FusedLayer)):
        layer.register_forward_pre_hook(lambda _, args: given.append((args[0], args[0].clone())))
    steps(base)
    (first, before), (second, then) = given[:2]
    assert torch.equal(first, before)
    assert not torch.equal(second, then)


class Lookalike(torch.nn.Module):
    """A layer of the same parts whose MLP reads what attention read."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)

    def forward(self, hidden_states, **kwargs):
        h = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return h + self.mlp(self.post_attention_layernorm(hidden_states))


class Swapped(Lookalike):
    """A layer that calls its norms the other way round than they are listed: which is first is seen, not assumed."""

    def forward(self, hidden_states, **kwargs):
        h = hidden_states + self.self_attn(self.post_attention_layernorm(hidden_states), **kwargs)[0]
        return h + self.mlp(self.input_layernorm(h))


def test_only_the_formula_is_fused_and_norms_by_their_order_of_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(base_module, "make_tunable", lambda _: None)  # its forwards go around those that were fused
    layer = small_llama(tmp_path)._model.model.layers[0]
    lookalike, swapped = Lookalike(layer), Swapped(layer)
    fuse_layer.fuse_layers(torch.nn.ModuleList([lookalike, swapped]))
    assert "forward" not in lookalike.__dict__
    assert fuse_layer._fused(swapped).first is layer.post_attention_layernorm
