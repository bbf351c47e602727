"""Decode graphs over the Triton operators, on a tape in place of a CUDA graph; see test_interpreter.py, deltatest.tape.

The tape replays recorded operations only, so a count, a rank, a grid or a decision taken from the host at recording
would show as a wrong number as soon as adapters or rows change.
"""

from __future__ import annotations

import pytest
import torch

from deltaserve.engine import graph_families
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model import base as base_module
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.fuse_layer import FusedLayer
from deltaserve_kernels import use_backend
from deltaserve_kernels.triton_ops import guard
from deltatest.graph_rig import NUM_SLOTS, GraphRig
from deltatest.tape import SyncError, Tape
from deltatest.tiny_models import save_random, tiny_config

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> BaseModel:
    config = tiny_config("llama", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    folder = save_random(config, tmp_path_factory.mktemp("base"))
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


@pytest.fixture(autouse=True)
def _triton_as_on_a_gpu(monkeypatch):
    """The operators by Triton, checking arguments as they do on a GPU: without looking."""
    monkeypatch.setattr(guard, "may_look", lambda tensor: False)
    before = use_backend("triton")
    yield
    use_backend(before)


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> BaseModel:
    """Layers and norms fused for Triton's operators, as on a GPU; two layers, so that strengths may differ by depth."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = save_random(tiny_config("llama", num_hidden_layers=2, **sizes), tmp_path_factory.mktemp("fused"))
    before = use_backend("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_module, "verify", lambda *_: None)  # minutes of attention in the interpreter
        loaded = load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")
    use_backend(before)
    assert any(isinstance(module.__dict__.get("forward"), FusedLayer) for module in loaded._model.modules())
    return loaded


def test_replays_follow_vectors_and_vocabularies_and_leave_everybody_else_s_bits(fused, monkeypatch):
    """Held to the PyTorch definition, which finds its rows on the host, and once to eager launches to the bit."""
    monkeypatch.setattr(graph_families, "MAX_FACTORS", 3)
    keys = [["lora", "vectors", "rotations", "factors", "fed", "vocabulary"]]
    rig = GraphRig(fused, capture=Tape(), row_counts=[2], keys=keys, has_vectors=True, has_vocabulary=True)
    for slot, families in enumerate((("vectors", "fed", "rotations", "factors"), ("lora", "vectors", "vocabulary"))):
        rig.fill(slot, families, share=1.0)
    batch = rig.random_batch(2, max_parts=0)
    base_alone = rig.graphs.run(batch).clone()

    def replay(*parts: tuple[ScheduledPart, ...]) -> torch.Tensor:
        for seq, own in zip(batch, parts, strict=True):
            seq.parts = own
        found = rig.graphs.run(batch).clone()
        rig.eager_kv.pool.copy_(rig.kv.pool[: rig.num_blocks])
        use_backend("reference")
        wanted = rig.new_runner().execute(batch)
        use_backend("triton")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        return found

    found = replay((ScheduledPart(1), ScheduledPart(0, 0.0, 1.0)), ())
    assert torch.equal(found[1], base_alone[1])
    assert not torch.equal(found[0], base_alone[0])
    rig.check(batch, "eager launches")
    assert torch.equal(replay((ScheduledPart(1, 0.0, 0.0),), (ScheduledPart(0, 0.0, 0.0),)), base_alone)
    # Other adapters in the slots, and none.
    rig.clear(0)
    rig.clear(1)
    rig.fill(1, ("vectors", "fed", "rotations", "vocabulary"), share=0.5)
    found = replay((ScheduledPart(0),), (ScheduledPart(1),))
    assert torch.equal(found[0], base_alone[0])
    assert not torch.equal(found[1], base_alone[1])


def many(count: int, first: int) -> tuple[ScheduledPart, ...]:
    return tuple(ScheduledPart((first + i) % NUM_SLOTS, 0.5, 1.0) for i in range(count))


def test_replays_follow_adapters_ranks_counts_and_rows_to_the_bit(base):
    tape = Tape()
    rig = GraphRig(base, capture=tape, row_counts=[3], keys=[["lora", "sparse"]])
    assert tape.num_steps > 100
    for step in range(3):
        rig.change_adapters()
        rig.check(rig.random_batch(max_parts=step), f"step {step}")
    assert rig.num_captures == 2
    # A composition without room in the list is launched, and the tape is none the worse for it.
    batch = [ScheduledSequence(i, [5 + i], 3, [i], many(4, i)) for i in range(3)]
    assert rig.graphs.run(batch) is None  # twelve parts; the list of three rows has room for eleven
    launched = ModelRunner(base, rig.kv, rig.tables, graphs=rig.graphs).execute(batch)
    rig.eager_kv.pool.copy_(rig.kv.pool[: rig.num_blocks])
    use_backend("reference")
    torch.testing.assert_close(launched, rig.eager.execute(batch), rtol=0, atol=1e-4)
    use_backend("triton")
    # A rank far above those at the capture, in rows side by side, on every linear.
    for slot, rank in ((0, 40), (1, 3)):
        rig.lora.clear(slot)
        rig.fill(slot, ("lora",), rank=rank, share=1.0)
    batch = rig.random_batch(3)
    for seq, slots in zip(batch, ([0], [1, 0], [1]), strict=True):
        seq.parts = tuple(ScheduledPart(slot) for slot in slots)
    rig.check(batch, "rank 40")


def test_replays_follow_blocks_to_the_bit(base):
    rig = GraphRig(base, capture=Tape(), row_counts=[2], keys=[["lora", "blocks"]], has_blocks=True)
    for step in range(2):
        for slot in range(NUM_SLOTS):
            rig.clear(slot)
            rig.fill(slot, ("blocks",) if slot % 2 else ("lora", "blocks"))
        rig.check(rig.random_batch(2, max_parts=2), f"step {step}")


def test_replays_follow_differences_and_modules_and_are_near_the_definition(base):
    rig = GraphRig(base, capture=Tape(), row_counts=[2], keys=[["apart"]], has_apart=True)
    rig.fill(0, ("dense", "modules"))
    rig.fill(1, ("dense",), share=0.4)
    assert rig.apart.dense.has_masks
    batch = rig.random_batch(2, max_parts=0)
    batch[0].parts = (ScheduledPart(0, 0.5, 1.0), ScheduledPart(1))
    rig.check(batch)
    found = rig.graphs._logits[:2].clone()
    use_backend("reference")
    torch.testing.assert_close(found, rig.eager.execute(batch), rtol=0, atol=1e-4)
    assert not torch.equal(found[0], rig.eager.execute([ScheduledSequence(0, *_plain(batch[0]))])[0])


def _plain(seq):
    return seq.token_ids, seq.start, seq.block_table


def test_an_operator_that_looks_cannot_be_captured(base):
    """So the plain PyTorch operators run without graphs; and the tape does see what would sync."""
    use_backend("reference")
    with pytest.raises(SyncError, match="to be captured"):
        GraphRig(base, capture=Tape(), row_counts=[1])
