"""Terms of the embedding and of the head: scales, low rank, and single rows that an adapter has trained.

The embedding is a matrix with one row a token, read by token id; the head one with one row a token, multiplied. Both
are numbered here as tables number linears. This is the PyTorch definition (``vocabulary_rows`` chooses). Trained rows
and the embedding's low rank have C++ twins on a CPU; scales and a bias of the head are ``scale_shift`` and its low rank
is ``lora_linear`` over the rows that get logits. Rows with a scaled embedding are a list of their own, always of the
definition. fp32 sums in binding order, each in an order that depends on nothing but the row itself, so that nobody's
bits depend on who else is in the step.
"""

from __future__ import annotations

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
from deltaserve_kernels.terms import scale_shift
from deltaserve_kernels.vector_tables import VectorEntry, VectorTables
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
        """Point a slot at an adapter's rows. Raises a KernelError and leaves the table as it was."""
        held = self.dtype
        self._check_places(slot, [matrix for matrix, _ in entries])
        for matrix, (ids, values) in entries:
            self._check_tensor("ids", ids, 1, (torch.int32,))
            self._check_tensor("values", values, 2, FLOAT_DTYPES)
            self._check_value_dtype("values", values.dtype, held)
            held = values.dtype
            if ids.numel() != values.shape[0] or not values.numel():
                raise ShapeMismatch(f"{ids.numel()} ids and values {list(values.shape)}; a row for each id is needed")
            if int(ids[0]) < 0 or bool((ids.diff() <= 0).any()):
                raise OutOfRange(f"ids {ids.tolist()[:8]} must be strictly ascending, none negative")
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
    """One adapter's terms: (matrix, A [r, in], B transposed [r, out]), (matrix, trained rows) and (matrix, scale and
    bias, fp32 [out] each; the embedding has no bias).

    Of the embedding ``in`` is the vocabulary and ``out`` the width of a row, of the head the other way round.
    """

    lora: tuple[tuple[int, Tensor, Tensor], ...] = ()
    rows: tuple[tuple[int, RowsEntry], ...] = ()
    vectors: tuple[tuple[int, VectorEntry], ...] = ()

    @property
    def nbytes(self) -> int:
        low_rank = sum(a.nbytes + b_t.nbytes for _, a, b_t in self.lora)
        vectors = sum(tensor.nbytes for _, entry in self.vectors for tensor in entry if tensor is not None)
        return low_rank + vectors + sum(entry.ids.nbytes + entry.values.nbytes for _, entry in self.rows)

    def to(self, device: torch.device) -> VocabularyEntries:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return VocabularyEntries(
            tuple((matrix, a.to(device), b_t.to(device)) for matrix, a, b_t in self.lora),
            tuple((matrix, RowsEntry(*(tensor.to(device) for tensor in entry))) for matrix, entry in self.rows),
            tuple((matrix, VectorEntry(move(entry.scale), move(entry.bias))) for matrix, entry in self.vectors),
        )


class VocabularyFamily:
    """Three tables over the same slots. For the engine thread, as all tables."""

    def __init__(self, num_slots: int, device: torch.device | str = "cpu") -> None:
        self.lora = LoraTables(2, num_slots, device)
        self.rows = RowsTables(num_slots, device)
        self.vectors = VectorTables(2, num_slots, device)
        self.num_slots = num_slots
        self._num_token_ids: dict[int, int] = {}

    @property
    def is_empty(self) -> bool:
        return self.lora.is_empty and self.rows.is_empty and self.vectors.is_empty

    def has_slot(self, slot: int) -> bool:
        """True when the slot has a term of the embedding or of the head."""
        return self.lora.has_slot(slot) or self.rows.has_slot(slot) or self.vectors.has_slot(slot)

    def has(self, matrix: int, slot: int) -> bool:
        return any(tables.get(matrix, slot) is not None for tables in (self.lora, self.rows, self.vectors))

    def set_all(self, slot: int, entries: VocabularyEntries) -> None:
        """Point a slot at an adapter's terms. Raises a KernelError; ``clear`` the slot then."""
        self.lora.set_all(slot, entries.lora)
        self.rows.set_all(slot, entries.rows)
        if any(matrix == EMBEDDING and entry.bias is not None for matrix, entry in entries.vectors):
            raise ShapeMismatch("a bias for the embedding; it takes a scale alone")
        self.vectors.set_all(slot, entries.vectors)
        self._num_token_ids[slot] = max((int(entry.ids[-1]) + 1 for _, entry in entries.rows), default=0)

    def num_token_ids(self, slot: int) -> int:
        """One more than the largest token with a row in the slot, which may lie beyond the base's matrix; else 0."""
        return self._num_token_ids.get(slot, 0)

    def clear(self, slot: int) -> None:
        """Empty a slot and let go of its tensors."""
        if self.has_slot(slot):
            self.lora.clear(slot)
            self.rows.clear(slot)
            self.vectors.clear(slot)
        self._num_token_ids.pop(slot, None)


@dataclass(frozen=True)
class VocabularyStep:
    """Rows of a step whose bindings change the embedding, among its token rows, and the head, among the rows that get
    logits; None where there are none. ``num_token_ids``: the most token ids that one of them has, where adapters add
    tokens to the base's. ``scaled``: of the token rows those whose bindings scale the embedding, and no others; they
    are not in ``embedding``."""

    family: VocabularyFamily
    embedding: WorkList | None
    head: WorkList | None
    num_token_ids: int = 0
    scaled: WorkList | None = None

    @property
    def changes_embedding(self) -> bool:
        return self.embedding is not None or self.scaled is not None


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
    scaled = [run for run in embedding if any(first and _scales(family, slot) for slot, first, _ in run[2])]
    plain = [run for run in embedding if run not in scaled] if scaled else embedding
    num_logits = num_rows
    if logit_rows is not None:
        places = torch.tensor(logit_rows, dtype=torch.int64)
        num_logits = len(logit_rows)
        bounds = torch.tensor([(start, start + count) for start, count, _ in head], dtype=torch.int64)
        moved = torch.searchsorted(places, bounds).tolist()
        head = [(lo, hi - lo, run[2]) for (lo, hi), run in zip(moved, head, strict=True) if hi > lo]
    return VocabularyStep(
        family,
        build_work_list_runs(plain, num_rows, device) if plain else None,
        build_work_list_runs(head, num_logits, device) if head else None,
        max((family.num_token_ids(slot) for run in (*embedding, *head) for slot, _, _ in run[2]), default=0),
        build_work_list_runs(scaled, num_rows, device) if scaled else None,
    )


def _scales(family: VocabularyFamily, slot: int) -> bool:
    return family.vectors.get(EMBEDDING, slot) is not None


def changed_embeddings(
    ids: Tensor, weight: Tensor, step: VocabularyStep, *, backend: str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows int64 [n], weights fp32 [n, width]): rows of the step whose token has another embedding than ``weight``
    [vocab, width] says, and that embedding. ``ids`` int64 [T]: the step's tokens."""
    if step.embedding is not None:
        yield from _changed_plain(ids, weight, step, step.embedding, backend)
    if step.scaled is not None:
        yield from embeddings_by_definition(ids, weight, step, step.scaled)


def _changed_plain(
    ids: Tensor, weight: Tensor, step: VocabularyStep, work: WorkList, backend: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    # Tokens beyond the matrix are the definition's: the operator reads rows of it.
    if step.num_token_ids <= len(weight) and _has_twin(step, weight, backend):
        from deltaserve_kernels.cpu import vocabulary as cpp

        found, values = cpp.changed_embeddings(ids, weight, work, step.family.lora, step.family.rows)
        if len(found):
            yield found, values
        return
    yield from embeddings_by_definition(ids, weight, step, work)


def embeddings_by_definition(
    ids: Tensor, weight: Tensor, step: VocabularyStep, work: WorkList
) -> Iterator[tuple[Tensor, Tensor]]:
    """``changed_embeddings`` of the rows of one list, by the definition: ``w * (1 + sum of scale * (s - 1))``, low rank
    and trained rows of every part."""
    for rows, parts in items_of(work):
        index = torch.tensor(rows, dtype=torch.int64, device=ids.device)
        tokens = ids[index]
        if bool((tokens >= max(len(weight), step.num_token_ids)).any()):
            raise OutOfRange(f"tokens {tokens.tolist()[:8]}; there are rows for 0..{len(weight) - 1}")
        stored = stored_rows(weight, tokens).float()
        total = torch.zeros(len(rows), weight.shape[1], device=ids.device)
        touched = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
        for slot, scale, _ in parts:
            low_rank, trained = step.family.lora.get(EMBEDDING, slot), step.family.rows.get(EMBEDDING, slot)
            vectors = step.family.vectors.get(EMBEDDING, slot)
            if scale and vectors is not None:
                total += stored * (scale * (vectors[0] - 1))
                touched[:] = True
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
            yield index[touched], (stored + total)[touched]


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
    """In a step with ``widened`` logits [R, W], set to minus infinity what a row's own adapters have no token for."""
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
    """Add the terms of the head in place: ``y`` [R, W >= vocab_size] are the base's logits of ``x`` [R, width]. Scales
    and biases, then low rank, then trained rows, each rounded."""
    work, family = step.head, step.family
    if work is None:
        return
    if family.vectors.has_any(HEAD):
        own_backend = backend if y.device.type == "cpu" else "reference"
        scale_shift(y, work, family.vectors, ((HEAD, 0, vocab_size),), 1.0, backend=own_backend)
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
