"""Terms of the embedding and of the head: scales, low rank, and single rows that an adapter has trained.

The embedding is a matrix with one row a token, read by token id; the head one with one row a token, multiplied. This is
the PyTorch definition (``vocabulary_rows`` chooses). Trained rows and the embedding's low rank have C++ twins on a CPU;
scales and a bias of the head are ``scale_shift``, its low rank is ``lora_linear``, over the rows that get logits. Rows
with a scaled embedding are a list of their own, always of the definition. fp32 sums in binding order, each in an order
that depends on nothing but the row itself, so that nobody's bits depend on who else is in the step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve_kernels.backend import select
from deltaserve_kernels.errors import OutOfRange
from deltaserve_kernels.operators import lora_linear
from deltaserve_kernels.reference import items_of
from deltaserve_kernels.terms import scale_shift
from deltaserve_kernels.vocabulary_family import EMBEDDING, HEAD, VocabularyFamily
from deltaserve_kernels.worklist import Run, WorkList, build_work_list_runs

DOTS_AT_ONCE = 256


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
        num_logits = len(logit_rows)
        moved = [[bisect_left(logit_rows, bound) for bound in (run[0], run[0] + run[1])] for run in head]
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
    work = step.embedding
    if work is not None and _has_twin(step, weight, backend):
        from deltaserve_kernels.cpu import vocabulary as cpp

        within, work = _by_their_tokens(work, step, len(weight))
        if within is not None:
            found, values = cpp.changed_embeddings(ids, weight, within, step.family.lora, step.family.rows)
            if len(found):
                yield found, values
    for own in (work, step.scaled):
        if own is not None:
            yield from embeddings_by_definition(ids, weight, step, own)


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
