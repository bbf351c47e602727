"""No kernel compiles during live traffic: launches are told apart as the just-in-time compiler tells them, without one.

The compiler makes a new binary for each value of a constexpr, and for each class (one, multiple of 16, other) of an
argument it may specialise. Traffic after a warm-up step of every operator must need no binary the warm-up did not.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed, and it decides what to compile", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from deltaserve.core import BASE_BINDING, SamplingParams
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.engine.sampler import Sampler
from deltaserve.engine.sequence import Sequence
from deltaserve.model import base as base_module
from deltaserve.model import weight
from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import (
    BlockTables,
    LoraTables,
    NormTables,
    RotationFactor,
    RotationTables,
    SparseTables,
    VectorTables,
    build_work_list_runs,
    triton_ops,
    use_backend,
)
from deltaserve_kernels.triton_ops import attention, blocks, guard, lora, pointwise, rotary, rotations, sparse, vectors
from deltatest.graph_rig import GraphRig
from deltatest.kernel_cases import PagedCase, Parts, csr
from deltatest.tape import NoLooking, NoLookingOps, SyncError, watched
from deltatest.tiny_models import ARCHITECTURES, build_tiny_model

MEMBERS = [(0, 0, 64), (1, 64, 96), (2, 96, 128)]
FORMS = [lora.DECODE, lora.PRODUCTS, lora.ONE_LAUNCH, lora.PREFILL]


@pytest.fixture
def binaries(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Fills with (kernel, what the compiler would key its binary by) of every launch; nothing runs."""
    seen: set[tuple[str, str]] = set()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[int, object] = {}

    def record(self: jit.JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        if id(self) not in binders:
            binders[id(self)] = jit.create_function_from_signature(self.signature, self.params, backend)
        _, specialisation, options = binders[id(self)](*args, **kwargs)  # type: ignore[operator]
        seen.add((self.__name__, f"{specialisation} {options}"))

    monkeypatch.setattr(jit.JITFunction, "run", record)
    return seen


class Tables(NamedTuple):
    lora: LoraTables
    sparse: SparseTables
    blocks: BlockTables
    vectors: VectorTables
    norms: NormTables


def tables_of(ranks: list[int], num_slots: int, linears: list[int]) -> Tables:
    """A slot for each rank. Blocks list as many columns as the rank, or rows where it is odd."""
    tables = Tables(*(kind(3, num_slots) for kind in (LoraTables, SparseTables, BlockTables, VectorTables, NormTables)))
    for slot, rank in enumerate(ranks):
        for linear in linears:
            width = MEMBERS[linear][2] - MEMBERS[linear][1]
            tables.lora.set(linear, slot, torch.zeros(rank, 64).bfloat16(), torch.zeros(rank, width).bfloat16())
            mask = torch.rand(width, 64) < 0.1
            tables.sparse.set(linear, slot, *csr(mask, torch.zeros(int(mask.sum()), dtype=torch.bfloat16)))
            listed = torch.arange(min(rank, width), dtype=torch.int32)
            d = torch.zeros(len(listed), 64 if rank % 2 else width).bfloat16()
            lists = {"out_rows": listed} if rank % 2 else {"in_cols": listed}
            tables.blocks.set(linear, slot, d, 64, width, **lists)
            tables.vectors.set(linear, slot, torch.ones(width), torch.ones(width) if rank % 2 else None)
            tables.norms.set(linear, slot, torch.ones(64))
    return tables


def step(num_rows: int, runs: list[tuple[int, int, Parts]], tables: Tables, depth: float) -> None:
    work = build_work_list_runs(runs, num_rows)
    x, y = torch.zeros(num_rows, 64).bfloat16(), torch.zeros(num_rows, 128).bfloat16()
    for form in FORMS:
        lora.lora_linear(y, x, work, tables.lora, MEMBERS, depth, form)
        vectors.lora_vector_linear(y, x, work, tables.lora, tables.vectors, MEMBERS, depth, form)
    for sparse_form in (sparse.DECODE, sparse.PROMPTS):
        sparse.sparse_linear(y, x, work, tables.sparse, MEMBERS, depth, sparse_form)
    for block_form in (blocks.DECODE, blocks.PROMPTS):
        blocks.block_linear(y, x, work, tables.blocks, MEMBERS, depth, block_form)
    turns = RotationTables(3, tables.lora.num_slots)
    for linear, size in ((0, 4), (2, 8)):
        _, start, stop = MEMBERS[linear]
        factor = RotationFactor(torch.zeros((stop - start) // size, size, size).bfloat16())
        turns.set_all(0, [(linear, (factor,) * (1 + num_rows % 3))])
    for has_prompts in (False, True):
        rows = replace(work, has_prompts=has_prompts)
        rotations.turn_rows(y, torch.zeros_like(y), rows, turns, MEMBERS, depth, 1 + num_rows % 3)
    vectors.rms_norm(x, x[0], 1e-6, work, tables.norms, num_rows % 3, depth)


def test_adapter_operators_compile_once(binaries: set[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    step(1, [(0, 1, ((0, 1.0, 1.0),))], tables_of([8], 1, [0]), 0.0)
    warm = set(binaries)
    low_rank, scattered = (
        {"shrink_rows", "expand_rows", "shrink", "expand", "fused"},
        {"sparse", "sparse_wide", "transpose"},
    )
    others = {"turn_rows", "blocks_by_row", "shrink_blocks", "expand_blocks", "store_items", "rms_norm"}
    assert {name for name, _ in warm} == {"build_tiles"} | low_rank | scattered | others
    draw = random.Random(0)
    for ranks, num_slots, linears in (([1, 5, 16, 64], 16, [0, 1, 2]), ([33], 7, [2]), ([8, 16], 2, [0, 2])):
        tables = tables_of(ranks, num_slots, linears)
        for num_rows in (1, 2, 16, 17, 48, 63):
            runs: list[tuple[int, int, Parts]] = []
            row = 0
            while row < num_rows:
                count = min(draw.choice([1, 1, 1, 16, 40]), num_rows - row)
                slots = draw.sample(range(len(ranks)), draw.randint(0, min(2, len(ranks))))
                runs.append((row, count, tuple((slot, draw.random(), 1.0) for slot in slots)))
                row += count
            step(num_rows, runs, tables, draw.random())
    assert binaries == warm


def test_what_the_base_runs_compiles_once(binaries: set[tuple[str, str]]) -> None:
    def run(q_lens: list[int], kv_lens: list[int], window: int | None) -> None:
        case = PagedCase(q_lens, kv_lens, 4, 2, 16, torch.bfloat16)
        attention.paged_attention(*case.args, scale=0.25, window=window)
        k = torch.zeros(sum(q_lens), 2, 16).bfloat16()
        attention.write_kv(k, k, case.k_cache, case.v_cache, torch.arange(sum(q_lens)))
        angles = torch.zeros(sum(q_lens), 8)
        index = torch.arange(sum(q_lens))
        rotary.rotate_and_write_kv(case.q, k, k, angles, angles, case.k_cache, case.v_cache, index)
        qkv = torch.zeros(sum(q_lens), 128).bfloat16()
        angles = torch.zeros(sum(q_lens), 16).bfloat16()
        pointwise.rotate_and_store(qkv, angles, angles, case.k_cache, case.v_cache, index)
        pointwise.rms_norm(qkv, qkv[0], 1e-5 * (1 + len(q_lens)), float(len(q_lens) > 1))
        pointwise.gated_product(qkv, "silu")

    run([1], [1], None)
    run([1], [1], 8)
    warm = set(binaries)
    assert {name for name, _ in warm} == {"decode", "combine", "prefill", "store_kv", *FUSED}
    for q_lens, kv_lens in (([1, 1, 1], [5, 40, 16]), ([17], [17]), ([1, 0, 30, 1], [33, 3, 90, 256])):
        for window in (None, 1, 16, 100):
            run(q_lens, kv_lens, window)
    assert binaries == warm


def prompts(draw: random.Random, num_blocks: int) -> list[ScheduledSequence]:
    """A step with prompts, chunks of prompts and decoding sequences; tables may share blocks, as nothing runs."""
    batch = []
    for i in range(draw.randint(1, 4)):
        count = draw.choice([1, 1, 2, 3, 16, 17, 40, 64])
        start = draw.choice([0, 0, 7, 16])
        table = [draw.randrange(num_blocks) for _ in range(-(-(start + count) // 16))]
        logits = draw.choice(["none", "last", "all"])
        batch.append(ScheduledSequence(i, [3] * count, start, table, logits=logits))  # type: ignore[arg-type]
    return batch


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights in their own order, modules fused for Triton's operators; whose results, as nothing runs, say nothing."""
    monkeypatch.setattr(triton_ops, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(guard, "may_look", lambda tensor: False)
    monkeypatch.setattr(weight, "_prepack", lambda _: None)
    monkeypatch.setattr(base_module, "verify", lambda *_: None)
    before = use_backend("triton")
    yield
    use_backend(before)


def loaded(architecture: str, dtype: torch.dtype, folder: Path) -> BaseModel:
    return load_base(build_tiny_model(architecture, folder), dtype=dtype, cache_dir=folder / "cache")


# Modules that look alike in a step of a base: norms, gated MLPs, rotary with the KV write. Else the write alone.
FUSED = {"rms_norm_rows", "gated_rows", "rotate_and_store"}
STEP = {"build_tiles", "shrink_rows", "expand_rows", "sparse", "decode", "combine"}
MATRICES = {"blocks_by_row", "dense", "module_down", "module_up"}
# Where products add onto the residual stream.
ASIDE = {"set_module_rows_aside", "put_module_rows_back"}
PROMPT = {"shrink", "expand", "transpose", "sparse_wide", "prefill", "shrink_blocks", "expand_blocks"}
# Vector terms by row; where products add onto the stream two more, and norms by their kind.
BY_ROW = {"store_items", "scale_rows", "feed_rows", "gather_rows", "turn_rows"}
STREAM = {"flag_rows", "set_rows_aside", "put_rows_back"}
VOCABULARY = {"embedding_rows", "put_rows", "head_rows", "hide_added_rows"}
EVERY_FAMILY = {"has_vectors": True, "has_blocks": True, "has_apart": True, "has_vocabulary": True}


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_no_architecture_looks_into_a_tensor_in_a_decode_pass(
    architecture: str, binaries: set[tuple[str, str]], as_on_a_gpu: None, tmp_path: Path
) -> None:
    """A look would be a sync in every step, and what it saw would be frozen in the graph. Kernels do not run here."""
    base = loaded(architecture, torch.float32, tmp_path)
    rig = GraphRig(base, capture=watched, row_counts=[1, 3], **EVERY_FAMILY)
    rig.change_adapters()
    assert rig.graphs.run(rig.random_batch(2)) is not None
    names = {name for name, _ in binaries}
    shared = BY_ROW if any(len(group) > 1 for group in base.groups()) else BY_ROW - {"gather_rows"}
    norms = {"changed_norm_rows", "change_norm_rows"}
    assert names - FUSED - STREAM - ASIDE - {"store_kv"} - norms == STEP | MATRICES | shared | VOCABULARY
    assert names & STREAM in (STREAM, set())
    assert names & ASIDE == (ASIDE if names & STREAM else set())
    assert names & norms or not base.norms
    assert names & {"store_kv", "rotate_and_store"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_no_step_looks_into_a_tensor_and_sampling_does_once(
    architecture: str, binaries: set[tuple[str, str]], as_on_a_gpu: None, tmp_path: Path
) -> None:
    """Steps that are launched, with adapters of every kind: what the host counts with are numbers of Python and arrays
    of numpy, so a look into any tensor is one into the device's."""
    base = loaded(architecture, torch.float32, tmp_path)
    rig = GraphRig(base, capture_now=False, **EVERY_FAMILY)
    rig.sparse.keep_jagged()  # as a server's tables on a GPU
    runner = ModelRunner(base, rig.kv, rig.tables)
    rig.fill(0, ("lora", "sparse", "vectors", "fed", "rotations", "factors"), share=1.0)
    rig.fill(0, ("modules",))
    rig.fill(1, ("blocks", "dense", "vocabulary", "added"))
    rig.fill(2, ("lora", "vectors"))
    for _ in range(4):
        batch = [*prompts(rig.draw, rig.num_blocks), *rig.random_batch(2)]
        for seq in batch:
            seq.parts = rig.random_parts(seq.start, 2)
        batch[0].parts, batch[1].parts = (ScheduledPart(0),), (ScheduledPart(1),)
        for step in (batch, rig.random_batch(3)):
            with NoLooking(), NoLookingOps():
                runner.execute(step)
    assert {"turn_rows", "hide_added_rows"} <= {name for name, _ in binaries}
    seqs = [sequence(**options) for options in SAMPLING]
    for width in (base.vocab_size, base.vocab_size + 3):
        sampler, rows = Sampler(base.vocab_size), torch.randn(len(seqs), width)
        with NoLooking(num_allowed=1):
            sampler.sample(rows, seqs)
        with NoLooking(), pytest.raises(SyncError):
            sampler.sample(rows, seqs)


SAMPLING: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": ((3, -1.0),)},
]


def sequence(**options: object) -> Sequence:
    return Sequence(
        seq_id=0,
        request_id="r",
        index=0,
        token_ids=[1, 2],
        num_prompt_tokens=1,
        sampling=SamplingParams(max_tokens=9, **options),  # type: ignore[arg-type]
        binding=BASE_BINDING,
        versions=(),
        priority=(0.0, 0),
        arrival_seconds=0.0,
        stop_token_ids=frozenset(),
    )


@pytest.mark.parametrize(
    ("architecture", "fused"),
    [
        ("llama", FUSED | STREAM | ASIDE | {"gather_rows", "changed_norm_rows"}),
        ("gemma2", FUSED | {"gather_rows", "changed_norm_rows"}),
        ("qwen3", {"rms_norm_rows", "gated_rows", "store_kv", "gather_rows", "changed_norm_rows"}),
        ("gpt2", {"store_kv", "change_norm_rows"}),
        ("phi3-longrope", {"rms_norm_rows", "store_kv", "changed_norm_rows"}),
    ],
)
@pytest.mark.parametrize("has_graphs", [True, False], ids=["graphs", "eager"])
def test_serving_compiles_nothing_after_the_warm_up(
    architecture: str,
    fused: set[str],
    has_graphs: bool,
    binaries: set[tuple[str, str]],
    as_on_a_gpu: None,
    tmp_path: Path,
) -> None:
    """Warm-up meets an empty server; then adapters of any kind come, in steps of every shape."""
    base = loaded(architecture, torch.bfloat16, tmp_path)
    rig = GraphRig(base, capture_now=False, **EVERY_FAMILY)
    graphs = rig.graphs if has_graphs else None
    runner = ModelRunner(base, rig.kv, rig.tables, graphs=graphs)
    runner.warm_up(max_tokens=256)
    warm = set(binaries)
    served = {*STEP, *MATRICES, *PROMPT, *BY_ROW - {"gather_rows"}, *VOCABULARY}
    assert {name for name, _ in warm} == {*served, *fused}
    for i in range(12):
        rig.change_adapters()
        rig.fill(0, ("lora", "sparse"), rank=rig.draw.choice([1, 300]))
        if i % 3:
            rig.clear(1)
            # Rows of logits as long as a multiple of 16, or not, whichever the base's are.
            rig.fill_vocabulary(1, num_added=rig.draw.choice([1, -base.vocab_size % 16]))
        runner.execute(rig.random_batch(max_parts=3))
        batch = [*prompts(rig.draw, rig.num_blocks), *rig.random_batch()[: rig.draw.randint(0, 3)]]
        for seq in batch:
            seq.parts = rig.random_parts(seq.start, 2)
        rig.draw.shuffle(batch)
        runner.execute(batch)
    assert binaries == warm, f"compiled late: {sorted(binaries - warm)}"
