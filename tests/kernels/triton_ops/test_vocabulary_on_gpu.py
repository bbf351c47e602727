"""Terms of embedding and head on a GPU: bf16, a vocabulary of thousands, in a captured graph; see test_on_gpu.py."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

# DELTASERVE_TEST_DEVICE=cpu with TRITON_INTERPRET=1 tries these tests themselves, small, without a GPU.
if "DELTASERVE_TEST_DEVICE" not in os.environ and not torch.cuda.is_available():
    pytest.skip("no CUDA device; test_interpreter and test_aot cover the host", allow_module_level=True)
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed, and it compiles the kernels", allow_module_level=True)

from deltaserve_kernels import (
    EMBEDDING,
    HEAD,
    PaddedLayout,
    RowsEntry,
    VocabularyEntries,
    VocabularyFamily,
    VocabularyStep,
    change_embeddings,
    change_head,
    use_backend,
)
from deltatest.kernel_cases import Parts, randn

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("DELTASERVE_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NUM_ROWS, VOCAB, WIDTH, NUM_TRAINED = (64, 32000, 4096, 700) if ON_GPU else (6, 70, 48, 9)
BINDINGS: list[Parts] = [(), ((0, 1.0, 0.5),), ((1, 0.5, 2.0), (0, -1.0, 1.0)), ((1, 1.0, 1.0),), ((1, 0.0, 0.0),)]
PLAIN = [row for row in range(NUM_ROWS) if row % len(BINDINGS) in (0, 4)]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    before = use_backend("triton")
    yield
    use_backend(before)


def fill(family: VocabularyFamily, seed: int) -> None:
    def rows(at: int, step: int) -> RowsEntry:
        ids = torch.arange(at, at + step * NUM_TRAINED, step, dtype=torch.int32)
        return RowsEntry(ids.to(DEVICE), randn(NUM_TRAINED, WIDTH, dtype=DTYPE, seed=seed + at, scale=0.1).to(DEVICE))

    def matrix(rank: int, columns: int, at: int) -> torch.Tensor:
        return randn(rank, columns, dtype=DTYPE, seed=seed + at, scale=0.1).to(DEVICE)

    low_rank = ((EMBEDDING, matrix(8, VOCAB, 1), matrix(8, WIDTH, 2)), (HEAD, matrix(8, WIDTH, 3), matrix(8, VOCAB, 4)))
    family.set_all(0, VocabularyEntries(rows=((EMBEDDING, rows(0, 2)), (HEAD, rows(5, 1)))))
    family.set_all(1, VocabularyEntries(low_rank, ((HEAD, rows(7, 3)),)))


def new_step() -> tuple[VocabularyStep, torch.Tensor]:
    """The step, and the buffer that its list lies in."""
    layout = PaddedLayout(NUM_ROWS)
    packed = np.empty(layout.size, dtype=np.int32)
    layout.fill(packed, [BINDINGS[row % len(BINDINGS)] for row in range(NUM_ROWS)])
    buffer = torch.from_numpy(packed).to(DEVICE)
    family = VocabularyFamily(2, DEVICE)
    fill(family, 1)
    family.lora.reserve_rank(16)
    work = layout.work_list(buffer)
    return VocabularyStep(family, work, work), buffer


IDS = torch.tensor([0, 2, 4, VOCAB - 1, 1, 6, 3, 8][:8] * 8, dtype=torch.int64)[:NUM_ROWS].to(DEVICE)
WEIGHT = randn(VOCAB, WIDTH, dtype=DTYPE, seed=5).to(DEVICE)
X = randn(NUM_ROWS, WIDTH, dtype=DTYPE, seed=6, scale=WIDTH**-0.5).to(DEVICE)
Y = randn(NUM_ROWS, VOCAB, dtype=DTYPE, seed=7).to(DEVICE)


def run(step: VocabularyStep) -> tuple[torch.Tensor, torch.Tensor]:
    rows, logits = WEIGHT[IDS], Y.clone()
    change_embeddings(rows, IDS, WEIGHT, step, lambda found: found)
    change_head(logits, X, step, VOCAB)
    return rows, logits


def test_both_equal_the_definition_and_leave_the_rest() -> None:
    step, _ = new_step()
    found = run(step)
    use_backend("reference")
    wanted = run(step)
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.float(), expected.float(), rtol=2**-7, atol=2e-3)
    for got, before in zip(found, (WEIGHT[IDS], Y), strict=True):
        assert torch.equal(got[PLAIN], before[PLAIN])
        assert not torch.equal(got, before)


@pytest.mark.skipif(not ON_GPU, reason="graphs are captured on CUDA only")
def test_captured_launches_follow_the_tables() -> None:
    step, buffer = new_step()
    first = [tensor.clone() for tensor in run(step)]  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # A list object of its own: what is derived from it belongs into the graph.
        work = PaddedLayout(NUM_ROWS).work_list(buffer)
        found = run(VocabularyStep(step.family, work, work))
    for change in (None, 100, -1):
        if change == -1:
            step.family.clear(0)
            step.family.clear(1)
        elif change is not None:
            fill(step.family, change)
        graph.replay()
        for got, expected in zip(found, run(step) if change is not None else first, strict=True):
            assert torch.equal(got, expected), change
