"""Terms of embedding and head in the form of the device: by Triton's kernels, whose launches are the same whatever the
tables hold, eagerly and in captured graphs; else by the definition or its C++ twins, which find their rows on the
host. Scales of the embedding and the head, and biases of the head, are the definition's on a GPU, and in no graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deltaserve_kernels.backend import select
from deltaserve_kernels.operators import lora_linear
from deltaserve_kernels.terms import scale_shift
from deltaserve_kernels.vocabulary import VocabularyStep, changed_embeddings, embeddings_by_definition
from deltaserve_kernels.vocabulary import change_head as change_head_by_definition
from deltaserve_kernels.vocabulary import hide_added as hide_added_by_definition
from deltaserve_kernels.vocabulary_family import HEAD


def change_embeddings(
    y: Tensor, ids: Tensor, weight: Tensor, step: VocabularyStep, look_up: Callable[[Tensor], Tensor]
) -> None:
    """Rows of ``y`` [T, width] whose token has another embedding become ``look_up`` of that, in place.

    ``ids`` int64 [T]: the step's tokens; ``weight`` [vocab, width]; ``look_up`` takes and gives rows [n, width] of the
    weight's dtype. Raises a KernelError.
    """
    if select(y.device) != "triton":
        for rows, weights in changed_embeddings(ids, weight, step):
            y[rows] = look_up(weights.to(weight.dtype))
        return
    if step.embedding is not None:
        from deltaserve_kernels.triton_ops import vocabulary

        work = step.embedding
        weights, touched = vocabulary.embedding_rows(ids, weight, work, step.family.lora, step.family.rows)
        vocabulary.put_rows(y, look_up(weights), touched, work)
    if step.scaled is not None:
        for rows, weights in embeddings_by_definition(ids, weight, step, step.scaled):
            y[rows] = look_up(weights.to(weight.dtype))


def change_head(y: Tensor, x: Tensor, step: VocabularyStep, vocab_size: int, *, backend: str | None = None) -> None:
    """Add the terms of the head in place: ``y`` [R, W >= vocab_size] are the base's logits of ``x`` [R, width];
    scales, biases and low rank of the first ``vocab_size`` columns, then trained rows, each rounded. Raises a
    KernelError."""
    work, family = step.head, step.family
    if work is None:
        return
    if select(y.device, backend) != "triton":
        change_head_by_definition(y, x, step, vocab_size, backend=backend)
        return
    from deltaserve_kernels.triton_ops import vocabulary

    if not work.is_padded and family.vectors.has_any(HEAD):
        scale_shift(y, work, family.vectors, ((HEAD, 0, vocab_size),), 1.0, backend="reference")
    if work.is_padded or family.lora.has_any(HEAD):
        # Rows as far apart as in any step: kernels are compiled by that, and not in live traffic. A single row is
        # contiguous whatever its stride.
        is_wide = y.shape[1] != vocab_size
        known = y[:, :vocab_size].clone(memory_format=torch.contiguous_format) if is_wide else y
        lora_linear(known, x, work, family.lora, ((HEAD, 0, vocab_size),), 1.0)
        if is_wide:
            y[:, :vocab_size] = known
    if work.is_padded or family.rows.has_any(HEAD):
        vocabulary.head_rows(y, x, work, family.rows)


def hide_added(logits: Tensor, step: VocabularyStep, vocab_size: int) -> None:
    """In a step with ``widened`` logits float32 [R, W], set to minus infinity what a row's own adapters have no token
    for."""
    if step.head is None or logits.shape[1] <= vocab_size:
        return
    if select(logits.device) != "triton":
        hide_added_by_definition(logits, step, vocab_size)
        return
    from deltaserve_kernels.triton_ops import vocabulary

    vocabulary.hide_added(logits, step.head, step.family.sizes, vocab_size)
