"""Decode graphs on a GPU: replays equal to eager launches bit for bit, no sync, no compile, no memory, no new capture.

The tape of ``graph_cases`` holds the same promises where only the host can break them; streams, the graphs' memory pool
and the compiler show here alone.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
from collections.abc import Iterator

import pytest
import torch

# DELTASERVE_TEST_DEVICE=cpu with TRITON_INTERPRET=1 tries these tests themselves, on a tape, without a GPU.
if "DELTASERVE_TEST_DEVICE" not in os.environ and not torch.cuda.is_available():
    pytest.skip("no CUDA device; test_decode_graphs covers the host", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed, and it compiles the kernels", allow_module_level=True)

from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.graph_capture import CudaCapture
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.engine.sampler import Sampler
from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import use_backend
from deltaserve_kernels.triton_ops import (
    attention_kernels,
    block_kernels,
    block_rows,
    dense_kernels,
    guard,
    lora_programs,
    module_kernels,
    pointwise_kernels,
    rotary,
    rotation_kernels,
    row_items,
    sparse_kernels,
    tile_kernels,
    vector_row_kernels,
    vocabulary_kernels,
)
from deltatest.graph_rig import GraphRig
from deltatest.tape import Tape
from deltatest.tiny_models import save_random, tiny_config

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("DELTASERVE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
KERNELS = (
    lora_programs.shrink, lora_programs.expand, sparse_kernels.sparse, tile_kernels.build_tiles,
    attention_kernels.decode, attention_kernels.combine, attention_kernels.prefill, rotary.rotate_and_store,
    pointwise_kernels.rms_norm_rows, pointwise_kernels.gated_rows, block_rows.blocks_by_row,
    block_kernels.shrink_blocks, block_kernels.expand_blocks, dense_kernels.dense, module_kernels.module_down,
    module_kernels.module_up,
    row_items.store_items, row_items.flag_rows, rotation_kernels.turn_rows,
    vector_row_kernels.scale_rows, vector_row_kernels.feed_rows, vector_row_kernels.gather_rows,
    vector_row_kernels.set_rows_aside, vector_row_kernels.put_rows_back, vector_row_kernels.changed_norm_rows,
    vocabulary_kernels.embedding_rows, vocabulary_kernels.put_rows, vocabulary_kernels.head_rows,
    vocabulary_kernels.hide_added_rows,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = save_random(tiny_config("llama", **(SIZES if ON_GPU else SMALL)), tmp_path_factory.mktemp("base"))
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    # What is fused is decided at load; on the host verifying a base in the interpreter would take minutes.
    before = use_backend("triton" if ON_GPU else "auto")
    try:
        return load_base(folder, dtype=dtype, device=DEVICE, cache_dir=folder / "cache")
    finally:
        use_backend(before)


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not ON_GPU:
        monkeypatch.setattr(guard, "may_look", lambda tensor: False)
    before = use_backend("triton")
    yield
    use_backend(before)


def rig_of(base: BaseModel, **options: object) -> GraphRig:
    capture = CudaCapture(base.device) if ON_GPU else Tape()
    if not ON_GPU:
        families = ["vectors", "fed"] if "has_vectors" in options else ["lora", "sparse"]
        options = {"row_counts": [3], "keys": [families], **options}
    options = {"has_blocks": ON_GPU, "has_apart": ON_GPU, **options}
    return GraphRig(base, capture=capture, max_seqs=20 if ON_GPU else 3, **options)  # type: ignore[arg-type]


@torch.inference_mode()
def check_against_launches(rig: GraphRig, batch: list[ScheduledSequence], name: str) -> None:
    """Replay, then launch the very same padded step operator by operator: one set of bits."""
    graphs, before = rig.graphs, rig.kv.pool.clone()
    replayed: list[tuple[int, frozenset[str]]] = []
    plain = dict(graphs._replays)
    for key, replay in plain.items():
        graphs._replays[key] = lambda key=key, replay=replay: (replayed.append(key), replay())  # type: ignore[misc]
    found = graphs.run(batch)
    graphs._replays = plain
    assert found is not None, name
    found, written = found.clone(), rig.kv.pool.clone()
    rig.kv.pool.copy_(before)
    graphs._pass(*replayed[0])
    assert torch.equal(graphs._logits[: len(batch)], found), name
    # Rows that fill up may share a place of the scratch block, and race for it.
    assert torch.equal(rig.kv.pool[: rig.num_blocks], written[: rig.num_blocks]), name
    assert found.isfinite().all(), name


def test_replays_equal_launches_and_follow_the_tables(base: BaseModel) -> None:
    rig = rig_of(base)
    assert rig.num_captures == rig.graphs.num_graphs
    for step in range(60 if ON_GPU else 2):
        rig.change_adapters()
        check_against_launches(rig, rig.random_batch(max_parts=step % 3), f"step {step}")
    assert rig.num_captures == rig.graphs.num_graphs


def test_replays_with_vectors_equal_launches_and_follow_the_tables(base: BaseModel) -> None:
    rig = rig_of(base, has_vectors=True, has_vocabulary=ON_GPU)
    for step in range(60 if ON_GPU else 1):
        rig.change_adapters()
        if not ON_GPU:
            rig.lora.clear(0), rig.sparse.clear(0)
            rig.fill(0, ("vectors", "fed"))
        batch = rig.random_batch(max_parts=step % 3)
        if not ON_GPU:
            for seq in batch:
                seq.parts = (ScheduledPart(0),)
        check_against_launches(rig, batch, f"step {step}")
    assert rig.num_captures == rig.graphs.num_graphs


def test_a_row_s_bits_do_not_follow_the_vectors_of_others(base: BaseModel) -> None:
    """Of one bucket: rows of the base, of low rank and of vectors at strength 0 beside rows with vectors."""
    rig = rig_of(base, has_vectors=True)
    families = ("vectors", "fed") if not ON_GPU else ("lora", "vectors", "fed")
    rig.fill(0, families, share=1.0)
    batch = rig.random_batch(3, max_parts=0)
    batch[1].parts = (ScheduledPart(0, 0.0, 0.0),)

    def replay(strength: float) -> torch.Tensor:
        batch[2].parts = (ScheduledPart(0, strength, strength),)
        found = rig.graphs.run(batch)
        assert found is not None
        return found.clone()

    without, found = replay(0.0), replay(1.0)
    assert torch.equal(found[:2], without[:2])
    assert not torch.equal(found[2], without[2])


def test_replays_are_near_the_eager_runner(base: BaseModel) -> None:
    """Whose steps are not padded: a library's products may differ in the last bits with the number of rows."""
    rig = rig_of(base, **({"has_vectors": True, "has_vocabulary": True} if ON_GPU else {}))
    for _ in range(20 if ON_GPU else 1):
        rig.change_adapters()
        batch = rig.random_batch()
        rig.eager_kv.pool.copy_(rig.kv.pool[: rig.num_blocks])
        wanted = rig.eager.execute(batch)
        found = rig.graphs.run(batch)
        assert found is not None
        difference = (found - wanted).abs().max() / wanted.std()
        assert difference < (0.1 if ON_GPU else 1e-5)


@pytest.mark.skipif(not ON_GPU, reason="the tape raises on what would sync, in graph_cases")
def test_a_step_does_not_wait_and_sampling_waits_once(base: BaseModel) -> None:
    rig = rig_of(base, capture_now=False, has_vectors=True, has_vocabulary=True)
    runner = ModelRunner(base, rig.kv, rig.tables, graphs=rig.graphs)
    runner.warm_up()
    rig.change_adapters()
    batch = rig.random_batch(7)
    runner.execute(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = runner.execute(batch)
        runner.execute([ScheduledSequence(0, [3] * 20, 0, [0, 1], batch[0].parts)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            Sampler(base.vocab_size).sample(logits, sampling_sequences(len(batch)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in told) == 1


def sampling_sequences(count: int) -> list:  # type: ignore[type-arg]
    from deltaserve.core import BASE_BINDING, SamplingParams
    from deltaserve.engine.sequence import Sequence

    kinds = ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5})
    return [
        Sequence(
            seq_id=i,
            request_id=f"r{i}",
            index=0,
            token_ids=[1],
            num_prompt_tokens=1,
            sampling=SamplingParams(max_tokens=9, **kinds[i % 3]),  # type: ignore[arg-type]
            binding=BASE_BINDING,
            versions=(),
            priority=(0.0, i),
            arrival_seconds=0.0,
            stop_token_ids=frozenset(),
        )
        for i in range(count)
    ]


@pytest.mark.skipif(not ON_GPU, reason="no compiler and no device memory")
def test_a_thousand_replays_take_no_memory_and_compile_nothing(base: BaseModel) -> None:
    rig = rig_of(base, capture_now=False, has_vectors=True, has_vocabulary=True)
    runner = ModelRunner(base, rig.kv, rig.tables, graphs=rig.graphs)
    runner.warm_up(max_tokens=256)
    compiled = num_compiled()
    assert compiled >= len(KERNELS)
    together = (("dense", "modules"), ("sparse", "vectors", "vocabulary"), ("lora", "blocks", "vectors", "fed"))
    for slot, families in enumerate(together):
        rig.fill(slot, families, rank=20)
    batches = [rig.random_batch() for _ in range(20)]
    for batch in batches:
        runner.execute(batch)
    torch.cuda.synchronize()
    gc.collect()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for i in range(1000):
        runner.execute(batches[i % len(batches)])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= allocated
    assert torch.cuda.memory_reserved() == reserved
    for length in (2, 17, 100, 200):
        table = list(range(-(-length // 16)))
        runner.execute([ScheduledSequence(0, [3] * length, 0, table, (ScheduledPart(0), ScheduledPart(1)))])
    assert num_compiled() == compiled


def num_compiled() -> int:
    """Binaries of our kernels in this process."""
    return sum(len(caches[0]) for kernel in KERNELS for caches in kernel.device_caches.values())


def test_a_capture_leaves_the_cache_alone(base: BaseModel) -> None:
    rig = rig_of(base, capture_now=False)
    before = rig.kv.pool.clone()
    rig.graphs.capture()
    assert torch.equal(rig.kv.pool[: rig.num_blocks], before[: rig.num_blocks])
