"""Terms of the embedding and of the head: low rank, and single rows that an adapter has trained.

The embedding is a matrix with one row a token, read by token id; the head one with one row a token, multiplied. Both
are numbered here as tables number linears. This is the PyTorch definition (``vocabulary_rows`` chooses). Trained rows
and the embedding's low rank have C++ twins on a CPU, and a low-rank head is ``lora_linear`` over the rows that get
logits. fp32 sums in binding order, each in an order that depends on nothing but the row itself, so that nobody's bits
depend on who else is in the step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltaserve_kernels.backend import select
from deltaserve_kernels.errors import OutOfRange, ShapeMismatch
from deltaserve_kernels.operators import lora_linear
from deltaserve_kernels.pointer_tables import FLOAT_DTYPES, PointerTables
from deltaserve_kernels.reference import items_of
from deltaserve_kernels.tables import LoraTables
from deltaserve_kernels.worklist import Run, WorkList, build_work_list_runs

EMBEDDING, HEAD = 0, 1
DOTS_AT_ONCE = 256


class RowsEntry(NamedTuple):
    """Differences of some rows: token ids int32 [k], strictly ascending, and ``values`` [k, width]."""

    ids: Tensor
    values: Tensor


class RowsTables(PointerTables):
    """Trained rows, by embedding and head. ``get`` answers (ids, values).

    pointers: int64 [2, 2, num_slots]  addresses of ids and values; 0 where there are none
    counts:   int32 [2, num_slots]
    """

    ARRAYS = ("pointers", "counts")
    NOUN = "matrix"

    def __init__(self, num_slots: int, device: torch.device | str = "cpu") -> None:
        super().__init__(2, num_slots, device)
        self.pointers = self._array(2)
        self.counts = self._array(dtype=torch.int32)

    def set_all(self, slot: int, entries: Sequence[tuple[int, RowsEntry]]) -> None:
        """Point a slot at an adapter's rows, whose ids ``VocabularyEntries.scanned`` checks. Raises a KernelError and
        leaves the table as it was."""
        held = self.dtype
        self._check_places(slot, [matrix for matrix, _ in entries])
        for matrix, (ids, values) in entries:
            self._check_tensor("ids", ids, 1, (torch.int32,))
            self._check_tensor("values", values, 2, FLOAT_DTYPES)
            self._check_value_dtype("values", values.dtype, held)
            held = values.dtype
            if ids.numel() != values.shape[0] or not values.numel():
                raise ShapeMismatch(f"{ids.numel()} ids and values {list(values.shape)}; a row for each id is needed")
            self._check_dim(matrix, 1, values.shape[1])
        if entries:
            matrices = [matrix for matrix, _ in entries]
            rows = [entry for _, entry in entries]
            self._put(
                slot,
                matrices,
                [tuple(entry) for entry in rows],
                [(0, entry.values.shape[1]) for entry in rows],
                pointers=[(entry.ids.data_ptr(), entry.values.data_ptr()) for entry in rows],
                counts=[entry.ids.numel() for entry in rows],
            )


class VocabularyEntries(NamedTuple):
    """One adapter's terms: (matrix, A [r, in], B transposed [r, out]) and (matrix, trained rows).

    Of the embedding ``in`` is the vocabulary and ``out`` the width of a row, of the head the other way round.
    ``num_token_ids``: one more than the largest token with a row, once ``scanned`` has looked.
    """

    lora: tuple[tuple[int, Tensor, Tensor], ...] = ()
    rows: tuple[tuple[int, RowsEntry], ...] = ()
    num_token_ids: int | None = None

    @property
    def nbytes(self) -> int:
        low_rank = sum(a.nbytes + b_t.nbytes for _, a, b_t in self.lora)
        return low_rank + sum(entry.ids.nbytes + entry.values.nbytes for _, entry in self.rows)

    def to(self, device: torch.device) -> VocabularyEntries:
        return VocabularyEntries(
            tuple((matrix, a.to(device), b_t.to(device)) for matrix, a, b_t in self.lora),
            tuple((matrix, RowsEntry(*(tensor.to(device) for tensor in entry))) for matrix, entry in self.rows),
            self.num_token_ids,
        )

    def scanned(self) -> VocabularyEntries:
        """The same, its token ids checked: to be done on the host, for on a GPU looking waits. Raises OutOfRange."""
        if self.num_token_ids is not None:
            return self
        largest = -1
        for _, (ids, _) in self.rows:
            if not ids.numel() or int(ids[0]) < 0 or bool((ids.diff() <= 0).any()):
                raise OutOfRange(f"ids {ids.tolist()[:8]} must be strictly ascending, none negative")
            largest = max(largest, int(ids[-1]))
        return self._replace(num_token_ids=largest + 1)


class VocabularyFamily:
    """Two tables over the same slots. For the engine thread, as all tables."""

    def __init__(self, num_slots: int, device: torch.device | str = "cpu") -> None:
        self.lora = LoraTables(2, num_slots, device)
        self.rows = RowsTables(num_slots, device)
        self.num_slots = num_slots
        self._num_token_ids: dict[int, int] = {}
        # The same, int32 [num_slots]: what kernels hide foreign tokens by.
        self.sizes = torch.zeros(num_slots, dtype=torch.int32, device=device)

    @property
    def is_empty(self) -> bool:
        return self.lora.is_empty and self.rows.is_empty

    def has_slot(self, slot: int) -> bool:
        """True when the slot has a term of the embedding or of the head."""
        return self.lora.has_slot(slot) or self.rows.has_slot(slot)

    def has(self, matrix: int, slot: int) -> bool:
        return self.lora.get(matrix, slot) is not None or self.rows.get(matrix, slot) is not None

    def set_all(self, slot: int, entries: VocabularyEntries) -> None:
        """Point a slot at an adapter's terms; without a wait where they were scanned. Raises a KernelError; ``clear``
        the slot then."""
        entries = entries.scanned()
        self.lora.set_all(slot, entries.lora)
        self.rows.set_all(slot, entries.rows)
        self._num_token_ids[slot] = self.sizes[slot] = entries.num_token_ids or 0

    def num_token_ids(self, slot: int) -> int:
        """One more than the largest token with a row in the slot, which may lie beyond the base's matrix; else 0."""
        return self._num_token_ids.get(slot, 0)

    def clear(self, slot: int) -> None:
        """Empty a slot and let go of its tensors."""
        if self.has_slot(slot):
            self.lora.clear(slot)
            self.rows.clear(slot)
        if self._num_token_ids.pop(slot, 0):
            self.sizes[slot] = 0


@dataclass(frozen=True)
class VocabularyStep:
    """Rows of a step whose bindings change the embedding, among its token rows, and the head, among the rows that get
    logits; None where there are none. ``num_token_ids``: the most token ids that one of them has, where adapters add
    tokens to the base's."""

    family: VocabularyFamily
    embedding: WorkList | None
    head: WorkList | None
    num_token_ids: int = 0


def split_vocabulary(
    runs: Sequence[Run],
    num_rows: int,
    logit_rows: Sequence[int] | None,
    family: VocabularyFamily,
    device: torch.device | str = "cpu",
) -> VocabularyStep:
    """The rows among the runs of a step; ``logit_rows``, ascending, are those that get logits (None: all).

    A part counts where its scale is not 0: that at the first layer for the embedding, at the last one for the head.
    Raises as ``build_work_list_runs``.
    """
    embedding = [run for run in runs if any(first and family.has(EMBEDDING, slot) for slot, first, _ in run[2])]
    head = [run for run in runs if any(last and family.has(HEAD, slot) for slot, _, last in run[2])]
    num_logits = num_rows
    if logit_rows is not None:
        num_logits = len(logit_rows)
        moved = [[bisect_left(logit_rows, bound) for bound in (run[0], run[0] + run[1])] for run in head]
        head = [(lo, hi - lo, run[2]) for (lo, hi), run in zip(moved, head, strict=True) if hi > lo]
    return VocabularyStep(
        family,
        build_work_list_runs(embedding, num_rows, device) if embedding else None,
        build_work_list_runs(head, num_logits, device) if head else None,
        max((family.num_token_ids(slot) for run in (*embedding, *head) for slot, _, _ in run[2]), default=0),
    )


def changed_embeddings(
    ids: Tensor, weight: Tensor, step: VocabularyStep, *, backend: str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows int64 [n], weights fp32 [n, width]): rows of the step whose token has another embedding than ``weight``
    [vocab, width] says, and that embedding. ``ids`` int64 [T]: the step's tokens."""
    work = step.embedding
    if work is not None and _has_twin(step, weight, backend):
        from deltaserve_kernels.cpu import vocabulary as cpp

        within, work = _by_their_tokens(work, step, len(weight))
        if within is not None:
            found, values = cpp.changed_embeddings(ids, weight, within, step.family.lora, step.family.rows)
            if len(found):
                yield found, values
    for rows, parts in items_of(work) if work is not None else ():
        index = torch.tensor(rows, dtype=torch.int64, device=ids.device)
        tokens = ids[index]
        if bool((tokens >= max(len(weight), step.num_token_ids)).any()):
            raise OutOfRange(f"tokens {tokens.tolist()[:8]}; there are rows for 0..{len(weight) - 1}")
        total = torch.zeros(len(rows), weight.shape[1], device=ids.device)
        touched = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
        for slot, scale, _ in parts:
            low_rank, trained = step.family.lora.get(EMBEDDING, slot), step.family.rows.get(EMBEDDING, slot)
            if scale and low_rank is not None:
                a, b_t = low_rank
                # Of tokens that another adapter of the binding adds, low rank knows nothing.
                shrunk = stored_rows(a.t(), tokens).t().float() * scale
                for factors, row in zip(shrunk, b_t.float(), strict=True):
                    total += factors[:, None] * row
                touched[:] = True
            if scale and trained is not None:
                known, values = trained
                places = torch.searchsorted(known, tokens.int()).clamp(max=len(known) - 1)
                hits = known[places] == tokens
                total += values[places].float().masked_fill(~hits[:, None], 0.0) * scale
                touched |= hits
        if bool(touched.any()):
            stored = stored_rows(weight, tokens).float()
            yield index[touched], (stored + total)[touched]


def _by_their_tokens(work: WorkList, step: VocabularyStep, count: int) -> tuple[WorkList | None, WorkList | None]:
    """The rows whose adapters have no tokens beyond the ``count`` rows of the matrix, and the others, which are the
    definition's: the operator reads rows of the matrix. A row's own adapters say which it is, so that its bits do not
    depend on who beside it adds tokens."""
    if step.num_token_ids <= count:
        return work, None
    within: list[Run] = []
    beyond: list[Run] = []
    for rows, parts in items_of(work):
        is_within = all(step.family.num_token_ids(slot) <= count for slot, _, _ in parts)
        (within if is_within else beyond).extend((row, 1, tuple(parts)) for row in rows)
    lists = (build_work_list_runs(runs, work.num_rows, work.device) if runs else None for runs in (within, beyond))
    return next(lists), next(lists)


def stored_rows(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows of a matrix [vocab, width] by token, int64 [n]; zeros for tokens that it has no row for."""
    count = len(weight)
    if not bool((tokens >= count).any()):
        return weight[tokens]
    return weight[tokens.clamp(max=count - 1)].masked_fill((tokens >= count)[:, None], 0.0)


def widened(y: Tensor, step: VocabularyStep) -> Tensor:
    """Logits [R, vocab] with columns for the tokens that adapters of the step add, 0 so far."""
    num_more = step.num_token_ids - y.shape[1] if step.head is not None else 0
    return y if num_more <= 0 else torch.nn.functional.pad(y, (0, num_more))


def hide_added(logits: Tensor, step: VocabularyStep, vocab_size: int) -> None:
    """``vocabulary_rows.hide_added`` by its definition, which looks into the list."""
    if logits.shape[1] <= vocab_size or step.head is None:
        return
    own = [vocab_size] * len(logits)
    for rows, parts in items_of(step.head):
        count = max([vocab_size, *(step.family.num_token_ids(slot) for slot, _, scale in parts if scale)])
        for row in rows:
            own[row] = count
    columns = torch.arange(vocab_size, logits.shape[1], device=logits.device)
    foreign = columns >= torch.tensor(own, device=logits.device)[:, None]
    logits[:, vocab_size:].masked_fill_(foreign, float("-inf"))


def change_head(y: Tensor, x: Tensor, step: VocabularyStep, vocab_size: int, *, backend: str | None = None) -> None:
    """Add the terms of the head in place: ``y`` [R, W >= vocab_size] are the base's logits of ``x`` [R, width]. Low
    rank, then trained rows, each rounded."""
    work, family = step.head, step.family
    if work is None:
        return
    if family.lora.has_any(HEAD):
        lora_backend = backend if y.device.type == "cpu" else "reference"
        lora_linear(y, x, work, family.lora, ((HEAD, 0, vocab_size),), 1.0, backend=lora_backend)
    if not family.rows.has_any(HEAD):
        return
    if _has_twin(step, x, backend):
        from deltaserve_kernels.cpu import vocabulary as cpp

        cpp.change_rows(y, x, work, family.rows)
        return
    for rows, parts in items_of(work):
        for row in rows:
            for slot, _, scale in parts:
                trained = family.rows.get(HEAD, slot)
                if scale and trained is not None:
                    ids, values = trained
                    places = ids.long()
                    y[row, places] = (y[row, places].float() + scale * _dots(values, x[row].float())).to(y.dtype)


def _has_twin(step: VocabularyStep, tensor: Tensor, backend: str | None) -> bool:
    """Whether C++ operators run: on a CPU, where the terms have the dtype of what they change."""
    held = {step.family.lora.dtype, step.family.rows.dtype} - {None}
    return tensor.device.type == "cpu" and held <= {tensor.dtype} and select(tensor.device, backend) == "cpu"


def _dots(values: Tensor, x: Tensor) -> Tensor:
    """fp32 [k] of ``values`` [k, width] and ``x`` [width]. A matrix product's bits would depend on where a row lies."""
    return torch.cat([(some.float() * x).sum(dim=1) for some in values.split(DOTS_AT_ONCE)])
