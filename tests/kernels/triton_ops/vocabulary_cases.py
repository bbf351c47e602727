"""Terms of embedding and head in Triton's interpreter, over eager lists and padded ones; see test_interpreter.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from deltaserve_kernels import (
    EMBEDDING,
    HEAD,
    KernelError,
    PaddedLayout,
    RowsEntry,
    VocabularyEntries,
    VocabularyFamily,
    VocabularyStep,
    change_embeddings,
    change_head,
    hide_added,
    split_vocabulary,
    use_backend,
    widened,
)
from deltaserve_kernels.triton_ops import guard, vocabulary
from deltatest.kernel_cases import Parts, randn

VOCAB, WIDTH = 37, 24
# Slots: rows of both; rows of the head and low rank of both; nothing; rows that slots 0 and 1 have too.
BINDINGS: list[Parts] = [
    ((0, 1.0, 3.0),), (), ((1, -1.0, 1.0), (0, 0.5, 0.5)), ((1, 1.0, 1.0),), ((2, 1.0, 1.0),), ((0, 0.0, 0.0),),
    ((3, 1.0, 1.0), (1, 0.0, 2.0), (0, 2.0, 0.0)), ((0, 1.0, 0.0),),
]  # fmt: skip
IDS = torch.tensor([5, 5, 36, 7, 5, 5, 36, 1])
TOUCHED, HEADED = [0, 2, 3, 6], [0, 2, 3, 6]


@pytest.fixture(autouse=True)
def _triton(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(guard, "may_look", lambda tensor: False)
    monkeypatch.setattr(vocabulary, "BLOCK", 16)
    monkeypatch.setattr(vocabulary, "PROGRAMS", 3)
    before = use_backend("triton")
    yield
    use_backend(before)


def filled(dtype: torch.dtype) -> VocabularyFamily:
    def rows(seed: int, *ids: int) -> RowsEntry:
        return RowsEntry(torch.tensor(ids, dtype=torch.int32), randn(len(ids), WIDTH, seed=seed, dtype=dtype))

    family = VocabularyFamily(4)
    family.set_all(0, VocabularyEntries(rows=((EMBEDDING, rows(1, 0, 5, 36)), (HEAD, rows(2, 4, 5, 6, 7, 9, 20, 31)))))
    low_rank = (
        (EMBEDDING, randn(3, VOCAB, seed=3, dtype=dtype), randn(3, WIDTH, seed=4, dtype=dtype)),
        (HEAD, randn(2, WIDTH, seed=5, dtype=dtype), randn(2, VOCAB, seed=6, dtype=dtype)),
    )
    family.set_all(1, VocabularyEntries(low_rank, ((HEAD, rows(7, 5, 20)),)))
    family.set_all(3, VocabularyEntries(rows=((HEAD, rows(8, 5, 20, 36)),)))
    return family


def step_of(kind: str, dtype: torch.dtype) -> VocabularyStep:
    family = filled(dtype)
    if kind == "eager":
        return split_vocabulary([(row, 1, parts) for row, parts in enumerate(BINDINGS)], len(BINDINGS), None, family)
    layout = PaddedLayout(len(BINDINGS))
    packed = np.empty(layout.size, dtype=np.int32)
    layout.fill(packed, BINDINGS)
    work = layout.work_list(torch.from_numpy(packed))
    return VocabularyStep(family, work, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["eager", "captured"])
def test_embedding_and_head_equal_the_definition(kind, dtype):
    step, weight = step_of(kind, dtype), randn(VOCAB, WIDTH, dtype=dtype, seed=9)
    x, y = randn(len(BINDINGS), WIDTH, dtype=dtype, seed=10), randn(len(BINDINGS), VOCAB, dtype=dtype, seed=11)
    rows = weight[IDS] * 2
    results = []
    for backend in ("triton", "reference"):
        use_backend(backend)
        embedded, logits = rows.clone(), y.clone()
        change_embeddings(embedded, IDS, weight, step, lambda given: given * 2)
        change_head(logits, x, step, VOCAB)
        results.append((embedded, logits))
    (embedded, logits), (wanted_rows, wanted) = results
    exact = {"rtol": 2e-6, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2**-9, "atol": 2e-3}
    torch.testing.assert_close(embedded, wanted_rows, **exact)
    torch.testing.assert_close(logits, wanted, **exact)
    for found, before, changed in ((embedded, rows, TOUCHED), (logits, y, HEADED)):
        others = [row for row in range(len(BINDINGS)) if row not in changed]
        assert torch.equal(found[others], before[others])
        assert all(not torch.equal(found[row], before[row]) for row in changed)


def test_tokens_beyond_the_base_equal_the_definition_and_leave_low_rank_s_bits():
    """Rows with more tokens beside rows without, in logits that are wider."""
    family, weight = filled(torch.float32), randn(VOCAB, WIDTH, seed=9)
    alone = split_vocabulary([(row, 1, parts) for row, parts in enumerate(BINDINGS)], len(BINDINGS), None, family)
    added = RowsEntry(torch.tensor([5, VOCAB, VOCAB + 2], dtype=torch.int32), randn(3, WIDTH, seed=12))
    family.set_all(2, VocabularyEntries(rows=((EMBEDDING, added), (HEAD, added))))
    bindings = [*BINDINGS[:5], ((1, 1.0, 1.0), (2, 1.0, 1.0)), *BINDINGS[6:]]
    step = split_vocabulary([(row, 1, parts) for row, parts in enumerate(bindings)], len(bindings), None, family)
    ids = torch.where(torch.arange(len(bindings)) == 5, VOCAB + 2, IDS)
    x, y = randn(len(bindings), WIDTH, seed=10), randn(len(bindings), VOCAB, seed=11)
    before, results = weight[ids.clamp(max=VOCAB - 1)], []
    for backend in ("triton", "reference"):
        use_backend(backend)
        embedded, logits = before.clone(), widened(y, step)
        change_embeddings(embedded, ids, weight, step, lambda given: given)
        change_head(logits, x, step, VOCAB)
        hide_added(logits, step, VOCAB)
        results.append((embedded, logits))
    assert results[0][1].shape == (len(bindings), VOCAB + 3)
    assert results[0][1][4:6].isfinite().all(), "of low rank beside it too"
    assert (results[0][1][[0, 1, 2, 3, 6, 7], VOCAB:] == float("-inf")).all()
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-5)
    assert torch.equal(results[0][0][5], added.values[2])
    assert results[0][1][5, VOCAB + 2] != 0
    use_backend("triton")
    change_head(y, x, alone, VOCAB)
    assert torch.equal(results[0][1][[0, 2, 3, 6], :VOCAB], y[[0, 2, 3, 6]])
    # Of a fixed width, and by a list that is padded; a part that is 0 at the last layer has no tokens there.
    bindings[4] = ((2, 1.0, 0.0),)
    results[0][1][4, VOCAB:] = float("-inf")
    layout = PaddedLayout(len(bindings))
    packed = np.empty(layout.size, dtype=np.int32)
    layout.fill(packed, bindings)
    work = layout.work_list(torch.from_numpy(packed))
    captured = VocabularyStep(family, work, work, VOCAB + 150)
    logits = torch.zeros(len(bindings), VOCAB + 150)
    hide_added(logits, captured, VOCAB)
    assert torch.equal(logits[:, VOCAB : VOCAB + 3].isinf(), results[0][1][:, VOCAB:].isinf())
    assert (logits[:, VOCAB + 3 :] == float("-inf")).all()
    assert not logits[:, :VOCAB].any()


def test_arguments_that_do_not_fit_are_refused():
    step, weight = step_of("captured", torch.float32), randn(VOCAB, WIDTH)
    rows = weight[IDS]
    for ids, matrix in ((IDS.int(), weight), (IDS[1:], weight), (IDS, weight.half()), (IDS, randn(WIDTH, VOCAB).t())):
        with pytest.raises(KernelError):
            change_embeddings(rows, ids, matrix, step, lambda given: given)
    for y, x in ((randn(3, VOCAB), randn(8, WIDTH)), (randn(8, VOCAB), randn(8, 9)), (randn(8, VOCAB), rows.half())):
        with pytest.raises(KernelError):
            change_head(y, x, step, VOCAB)
