"""Terms of embedding and head against float64, and the split of a step's rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaserve_kernels import (
    EMBEDDING,
    HEAD,
    OutOfRange,
    RowsEntry,
    ShapeMismatch,
    VectorEntry,
    VocabularyEntries,
    VocabularyFamily,
    change_head,
    changed_embeddings,
    split_vocabulary,
    stored_rows,
    widened,
)
from deltatest.kernel_cases import Parts, randn
from deltatest.tape import NoLooking, NoLookingOps, SyncError

VOCAB, WIDTH, SLOTS = 37, 24, 4
BINDINGS: list[Parts] = [((0, 1.0, 3.0),), (), ((1, -1.0, 1.0), (0, 0.5, 0.5)), ((1, 1.0, 1.0),), ((2, 1.0, 1.0),)] * 9
RUNS = [(row, 1, parts) for row, parts in enumerate(BINDINGS)]


def entries(slot: int, dtype: torch.dtype = torch.float32) -> VocabularyEntries:
    """Slot 0: rows of both; slot 1: rows of the head and low rank of both; slot 2: nothing."""

    def rows(seed: int, *ids: int) -> RowsEntry:
        return RowsEntry(torch.tensor(ids, dtype=torch.int32), randn(len(ids), WIDTH, seed=seed, dtype=dtype))

    if slot == 0:
        return VocabularyEntries(rows=((EMBEDDING, rows(1, 0, 5, 36)), (HEAD, rows(2, 4, 5))))
    if slot == 1:
        return VocabularyEntries(
            (
                (EMBEDDING, randn(3, VOCAB, seed=3, dtype=dtype), randn(3, WIDTH, seed=4, dtype=dtype)),
                (HEAD, randn(2, WIDTH, seed=5, dtype=dtype), randn(2, VOCAB, seed=6, dtype=dtype)),
            ),
            ((HEAD, rows(7, 5, 20)),),
        )
    return VocabularyEntries()


def filled(dtype: torch.dtype = torch.float32) -> VocabularyFamily:
    family = VocabularyFamily(SLOTS)
    for slot in range(3):
        family.set_all(slot, entries(slot, dtype))
    return family


def matrix_change(matrix: int, slot: int) -> Tensor:
    """float64 [vocab, width]."""
    total = torch.zeros(VOCAB, WIDTH).double()
    given = entries(slot)
    for index, a, b_t in given.lora:
        if index == matrix:
            product = a.double().t() @ b_t.double()
            total += product if matrix == EMBEDDING else product.t()
    for index, (ids, values) in given.rows:
        if index == matrix:
            total[ids.long()] += values.double()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_against_float64(dtype: torch.dtype, backend: str) -> None:
    ids = torch.arange(len(BINDINGS)) * 5 % VOCAB
    weight = randn(VOCAB, WIDTH, seed=9, dtype=dtype)
    step = split_vocabulary(RUNS, len(RUNS), None, filled(dtype))
    found = weight[ids].float()
    changed: set[int] = set()
    for rows, weights in changed_embeddings(ids, weight, step, backend=backend):
        assert weights.dtype == torch.float32
        found[rows] = weights
        changed |= set(rows.tolist())
    for row, parts in enumerate(BINDINGS):
        wanted = weight.double() + sum(first * matrix_change(EMBEDDING, slot) for slot, first, _ in parts)
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(found[row].double(), wanted[ids[row]], rtol=0.0, atol=tolerance)
        if row not in changed:
            assert torch.equal(found[row], weight[ids[row]].float())
    assert {row for row, parts in enumerate(BINDINGS) if parts in (BINDINGS[1], BINDINGS[4])} & changed == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_all", [True, False])
def test_heads_against_float64(dtype: torch.dtype, with_all: bool, backend: str) -> None:
    """All rows get logits, or some: the list is then of those."""
    logit_rows = None if with_all else [0, 2, 3, 7, 8, 20, 44]
    places = list(range(len(BINDINGS))) if logit_rows is None else logit_rows
    step = split_vocabulary(RUNS, len(RUNS), logit_rows, filled(dtype))
    x, before = randn(len(places), WIDTH, seed=1, dtype=dtype), randn(len(places), VOCAB, seed=2, dtype=dtype)
    y = before.clone()
    change_head(y, x, step, VOCAB, backend=backend)
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    for place, row in enumerate(places):
        change = sum((last * matrix_change(HEAD, slot) for slot, _, last in BINDINGS[row]), torch.zeros(VOCAB, WIDTH))
        wanted = before[place].double() + change.double() @ x[place].double()
        torch.testing.assert_close(y[place].double(), wanted, rtol=0.0, atol=tolerance)
        if BINDINGS[row] in ((), ((2, 1.0, 1.0),)):
            assert torch.equal(y[place], before[place])
        for slot, _, _ in BINDINGS[row]:
            if slot == 0 and len(BINDINGS[row]) == 1:
                others = [token for token in range(VOCAB) if token not in (4, 5)]
                assert torch.equal(y[place, others], before[place, others])


def test_company_is_not_felt(backend: str) -> None:
    """Whatever the numbers of rows, tokens and ranks: a row alone has the bits that it has among others."""
    ids, weight = torch.arange(len(BINDINGS)) * 5 % VOCAB, randn(VOCAB, WIDTH, seed=9)
    x, before = randn(len(BINDINGS), WIDTH, seed=1), randn(len(BINDINGS), VOCAB, seed=2)

    def both(rows: list[int]) -> tuple[Tensor, Tensor]:
        runs = [(place, 1, BINDINGS[row]) for place, row in enumerate(rows)]
        step = split_vocabulary(runs, len(rows), None, filled())
        embedded, y = weight[ids[rows]].clone(), before[rows].clone()
        for places, weights in changed_embeddings(ids[rows], weight, step, backend=backend):
            embedded[places] = weights
        change_head(y, x[rows].contiguous(), step, VOCAB, backend=backend)
        return embedded, y

    together = both(list(range(len(BINDINGS))))
    for row in range(len(BINDINGS)):
        for found, wanted in zip(both([row]), together, strict=True):
            assert torch.equal(found[0], wanted[row]), row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_of_odd_width_equal_the_definition(dtype: torch.dtype, cpu_backend: str) -> None:
    """More trained rows than a task takes, more rows than are taken at once, two adapters that share ids."""
    vocab, width = 500, 41
    family = VocabularyFamily(2)
    for slot in range(2):
        ids = torch.arange(slot, vocab, 2 + slot, dtype=torch.int32)
        entry = RowsEntry(ids, randn(len(ids), width, seed=slot, dtype=dtype, scale=width**-0.5))
        low_rank = randn(5, vocab, seed=3, dtype=dtype), randn(5, width, seed=4, dtype=dtype)
        family.set_all(slot, VocabularyEntries(((EMBEDDING, *low_rank),), ((EMBEDDING, entry), (HEAD, entry))))
    runs = [(0, 40, ((0, 1.0, 1.0),)), (40, 5, ((1, 1.0, 1.0), (0, -0.5, 0.5))), (45, 1, ((1, 1.0, 2.0),))]
    step = split_vocabulary(runs, 47, None, family)
    x, before = randn(47, width, seed=5, dtype=dtype), randn(47, vocab, seed=6, dtype=dtype)
    found, wanted = before.clone(), before.clone()
    change_head(found, x, step, vocab, backend=cpu_backend)
    change_head(wanted, x, step, vocab, backend="reference")
    tolerance = {"atol": 1e-4, "rtol": 0.0} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2**-7}
    torch.testing.assert_close(found.float(), wanted.float(), **tolerance)
    assert torch.equal(found[46], before[46])
    weight, ids = randn(vocab, width, seed=7, dtype=dtype), torch.arange(47) * 7 % vocab
    embedded, expected = weight[ids].float(), weight[ids].float()
    for into, chosen in ((embedded, cpu_backend), (expected, "reference")):
        for rows, weights in changed_embeddings(ids, weight, step, backend=chosen):
            into[rows] = weights
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=1e-5)


def test_rows_beyond_the_matrix_are_refused(any_backend: str) -> None:
    family, weight = filled(), randn(VOCAB, WIDTH)
    step = split_vocabulary([(0, 2, ((0, 1.0, 1.0),))], 2, None, family)
    for bad_y, bad_x in (
        (torch.zeros(2, 5), torch.zeros(2, WIDTH)),
        (torch.zeros(2, VOCAB), torch.zeros(2, WIDTH - 1)),
        (torch.zeros(3, VOCAB), torch.zeros(2, WIDTH)),
    ):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            change_head(bad_y, bad_x, step, VOCAB, backend="cpu" if any_backend == "cpu" else "reference")
    with pytest.raises((ValueError, IndexError)):
        list(changed_embeddings(torch.tensor([0, VOCAB]), weight, step, backend=any_backend))


def test_a_run_of_many_rows_lies_among_the_rows_with_logits() -> None:
    family = filled()
    runs = [(0, 5, ((0, 1.0, 1.0),)), (5, 7, ((1, 1.0, 1.0),)), (12, 3, ())]
    step = split_vocabulary(runs, 15, [4, 6, 7, 11, 14], family)
    assert step.embedding is not None
    assert step.head is not None
    assert step.head.num_rows == 5
    assert step.head.rows.tolist() == [0, 1, 2, 3]
    assert step.head.item_rows.tolist() == [0, 1, 4]
    assert split_vocabulary(runs, 15, [12, 13], family).head is None


def test_parts_of_no_strength_are_in_no_list() -> None:
    step = split_vocabulary([(0, 2, ((0, 0.0, 1.0),)), (2, 1, ((0, 1.0, 0.0),))], 3, None, filled())
    assert step.embedding is not None
    assert step.head is not None
    assert (step.embedding.rows.tolist(), step.head.rows.tolist()) == ([2], [0, 1])


def test_low_rank_knows_nothing_of_tokens_that_another_part_adds() -> None:
    family, added = filled(), randn(1, WIDTH, seed=12)
    entry = RowsEntry(torch.tensor([VOCAB + 1], dtype=torch.int32), added)
    family.set_all(2, VocabularyEntries(rows=((EMBEDDING, entry), (HEAD, entry))))
    ids, weight = torch.tensor([VOCAB + 1, 5]), randn(VOCAB, WIDTH, seed=9)
    step = split_vocabulary([(0, 2, ((1, 1.0, 1.0), (2, 1.0, 1.0)))], 2, None, family)
    assert step.num_token_ids == VOCAB + 2
    ((rows, weights),) = changed_embeddings(ids, weight, step)
    assert rows.tolist() == [0, 1]
    assert torch.equal(weights[0], added[0])
    torch.testing.assert_close(weights[1], (weight.double() + matrix_change(EMBEDDING, 1))[5].float())
    # Neither does a low-rank head.
    x, before = randn(2, WIDTH, seed=1), randn(2, VOCAB, seed=2)
    y, alone = widened(before, step), before.clone()
    change_head(y, x, step, VOCAB)
    change_head(alone, x, split_vocabulary([(0, 2, ((1, 1.0, 1.0),))], 2, None, family), VOCAB)
    assert torch.equal(y[:, :VOCAB], alone)
    torch.testing.assert_close(y[:, VOCAB:], torch.stack([torch.zeros(2), x @ added[0]], dim=1))


def test_an_adapter_with_more_tokens_beside_it_changes_nobodys_bits(any_backend: str) -> None:
    family = filled()
    entry = RowsEntry(torch.tensor([4, VOCAB + 1], dtype=torch.int32), randn(2, WIDTH, seed=12))
    family.set_all(2, VocabularyEntries(rows=((EMBEDDING, entry), (HEAD, entry))))
    weight, x, before = randn(VOCAB, WIDTH, seed=9), randn(9, WIDTH, seed=1), randn(9, VOCAB, seed=2)
    ids = torch.tensor([7, 5, 0, 36, 2, 19, 5, 11, VOCAB + 1])

    def both(rows: list[int]) -> tuple[Tensor, Tensor]:
        parts = [((2, 1.0, 1.0),) if ids[row] > VOCAB else BINDINGS[row % 4] for row in rows]
        step = split_vocabulary([(place, 1, part) for place, part in enumerate(parts)], len(rows), None, family)
        embedded, y = stored_rows(weight, ids[rows]).clone(), widened(before[rows], step).clone()
        for places, weights in changed_embeddings(ids[rows], weight, step, backend=any_backend):
            embedded[places] = weights
        change_head(y, x[rows].contiguous(), step, VOCAB, backend=any_backend)
        return embedded, y[:, :VOCAB]

    together = both(list(range(9)))
    for row in range(9):
        for found, wanted in zip(both([row]), together, strict=True):
            assert torch.equal(found[0], wanted[row]), row
    assert torch.equal(together[0][8], entry.values[1])


def test_slots_come_and_go() -> None:
    family = filled()
    assert [family.has_slot(slot) for slot in range(SLOTS)] == [True, True, False, False]
    assert not family.is_empty
    family.clear(0)
    family.clear(1)
    assert family.is_empty


@pytest.mark.parametrize(
    ("ids", "rows", "error"),
    [([3, 2], 2, OutOfRange), ([2, 2], 2, OutOfRange), ([-1, 2], 2, OutOfRange), ([1, 2], 3, ShapeMismatch)],
)
def test_rows_that_make_no_sense_are_refused(ids: list[int], rows: int, error: type[Exception]) -> None:
    entry = RowsEntry(torch.tensor(ids, dtype=torch.int32), torch.ones(rows, WIDTH))
    family = VocabularyFamily(SLOTS)
    with pytest.raises(error):
        family.set_all(0, VocabularyEntries(rows=((HEAD, entry),)))
    assert family.is_empty


def test_scanned_entries_are_set_without_a_look() -> None:
    """On a GPU a look would hold the step loop."""
    entry = RowsEntry(torch.tensor([3, VOCAB + 1], dtype=torch.int32), torch.ones(2, WIDTH))
    entries, family = VocabularyEntries(rows=((HEAD, entry),)), VocabularyFamily(SLOTS)
    scanned = entries.scanned()
    with NoLooking(), NoLookingOps():
        family.set_all(1, scanned.to(torch.device("cpu")))
    assert family.num_token_ids(1) == VOCAB + 2
    assert family.sizes.tolist() == [0, VOCAB + 2, 0, 0]
    with NoLooking(), pytest.raises(SyncError):
        family.set_all(1, entries)
    family.clear(1)
    assert not family.sizes.any()


def test_scales_of_both_and_a_bias_of_the_head(backend: str) -> None:
    """Beside low rank and rows of others; rows without scales keep the bits that they have alone."""
    family = filled()
    grown, spread, shift = 1 + randn(WIDTH, seed=11), 1 + randn(VOCAB, seed=12), randn(VOCAB, seed=13)
    family.set_all(3, VocabularyEntries(vectors=((EMBEDDING, VectorEntry(grown)), (HEAD, VectorEntry(spread, shift)))))
    bindings: list[Parts] = [((3, 0.5, 0.5), (1, 1.0, 1.0)), ((1, 1.0, 1.0),), ((3, 0.0, 0.0),), (), ((3, 1.0, 1.0),)]
    runs = [(row, 1, parts) for row, parts in enumerate(bindings)]
    step = split_vocabulary(runs, len(runs), None, family)
    ids, weight = torch.tensor([4, 4, 9, 9, 20]), randn(VOCAB, WIDTH, seed=9)
    x, before = randn(len(runs), WIDTH, seed=1), randn(len(runs), VOCAB, seed=2)
    embedded, y = weight[ids].clone(), before.clone()
    for rows, weights in changed_embeddings(ids, weight, step, backend=backend):
        embedded[rows] = weights
    change_head(y, x, step, VOCAB, backend=backend)
    for row, parts in enumerate(bindings):
        wanted, logits = weight[ids[row]].double(), before[row].double()
        for slot, first, last in parts:
            if slot == 3:
                wanted = wanted + first * (grown.double() - 1) * weight[ids[row]]
                logits = logits + last * ((spread.double() - 1) * before[row] + shift)
            else:
                wanted = wanted + first * matrix_change(EMBEDDING, slot)[ids[row]]
                logits = logits + last * matrix_change(HEAD, slot) @ x[row].double()
        torch.testing.assert_close(embedded[row].double(), wanted, rtol=0.0, atol=1e-5)
        torch.testing.assert_close(y[row].double(), logits, rtol=0.0, atol=1e-4)
        if not any(first for _, first, _ in parts):
            assert torch.equal(embedded[row], weight[ids[row]])
            assert torch.equal(y[row], before[row])
    alone = split_vocabulary([(0, 1, bindings[1])], 1, None, family)
    ((_, same),) = changed_embeddings(ids[1:2], weight, alone, backend=backend)
    assert torch.equal(same[0], embedded[1])
    family.clear(3)
    assert not family.has_slot(3)


def test_the_embedding_has_no_bias() -> None:
    family = VocabularyFamily(SLOTS)
    with pytest.raises(ShapeMismatch):
        family.set_all(0, VocabularyEntries(vectors=((EMBEDDING, VectorEntry(bias=randn(WIDTH))),)))
