"""What a forward pass knows beyond its input ids, held thread-locally while the pass runs.

Modules carry weights only; how they are used (paged with adapters, or folded in fp32) and everything that lives for one
pass is in the context. So the engine thread and a proof in another thread can run the same modules at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deltaserve.model.kv_cache import KVCache
    from deltaserve_kernels import (
        ApartRows,
        ApartStep,
        BlockTables,
        LoraTables,
        SparseTables,
        VectorRows,
        VectorStep,
        VocabularyStep,
        WorkList,
    )


class JoinedTerms(NamedTuple):
    """``terms``: what a group's product takes with it; ``is_all``: no operator comes after it."""

    terms: Tensor
    is_all: bool


GroupsFound = dict[object, JoinedTerms | Literal[False]]
"""Of groups of linears, by themselves; False where no row changes anything of their product."""


@dataclass(slots=True, kw_only=True)
class PassContext:
    """What every kind of pass has.

    ``kv_regimes`` int64 [T] is set only for bases whose rope depends on the sequence's length
    (``BaseModel.kv_regime``); None means regime 0 for every row. ``head_rows`` [1, R, hidden] is set while the head
    runs alone: the rows that stand in for the decoder's output.
    """

    kv_regimes: Tensor | None = None
    head_rows: Tensor | None = None
    # What parallel modules read at the inputs of sublayers, by point: all rows.
    taps: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class ForwardContext(PassContext):
    """A paged step over T token rows of S sequences, flattened sequence after sequence.

    ``positions`` int64 [T]; ``cu_seqlens_q`` int32 [S+1], row ranges of the sequences; ``kv_lens`` int32 [S], positions
    valid after this step; ``block_tables`` int32 [S, B]; ``kv_index`` int64 [T] = block * 16 + offset, where each row's
    K and V go. ``work`` groups rows by binding; None or empty means base only. ``is_decode``: every sequence has one
    row, which spares a launch. Rows of ``work`` with further terms, each None when no row has any: ``vectors``, in the
    form of the device's operators; ``apart``, dense differences and residual modules; ``vocabulary``, changes of
    embedding or head; ``blocks``, the tables of row and column blocks. ``stream`` is what a fused layer returned last:
    a tensor of its own, which the next layer may add onto in place.
    """

    positions: Tensor
    cu_seqlens_q: Tensor
    kv_lens: Tensor
    block_tables: Tensor
    kv_index: Tensor
    kv: KVCache
    work: WorkList | None = None
    lora: LoraTables | None = None
    sparse: SparseTables | None = None
    vectors: VectorStep | VectorRows | None = None
    apart: ApartStep | ApartRows | None = None
    vocabulary: VocabularyStep | None = None
    blocks: BlockTables | None = None
    is_decode: bool = False
    stream: Tensor | None = None
    # What sublayers were fed, by attach point: what parallel modules of ``ApartRows`` read.
    inputs: dict[int, Tensor] = field(default_factory=dict)
    # What groups of linears found for the rows of ``work``; kept from step to step while rows and tables stay.
    found: GroupsFound = field(default_factory=dict)
    # Results of a projection group waiting for its other members: linear index -> (input rows, output slice).
    pending: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(slots=True)
class FoldedContext(PassContext):
    """A proof's pass over one short sequence: fp32 activations, dense causal attention, no KV cache.

    ``deltas`` maps a linear's name to a function giving its fp32 ``[out, in]`` difference; called once per pass.
    ``biases`` maps it to one giving the difference of its bias, ``[out]``. ``norms`` maps a norm's name to the
    differences of its weight and bias, ``[H]`` each or None. ``modules`` maps an attach point's name to a function of
    fp32 rows ``[..., H]`` whose result is added there; those in ``parallel`` read the sublayer's input. ``rows`` maps
    the embedding's or the head's name to a function of token ids ``[n]`` that gives the differences of their rows,
    fp32 ``[n, width]``; ``num_token_ids``, where an adapter adds tokens, counts those too. ``past``: K and V
    ``[kv_heads, p, head_dim]`` of each layer for positions before the sequence's own. ``seen``, where given, gets what
    attention caches of this pass: K and V ``[kv_heads, T, head_dim]`` by layer. ``precision``, where given, is what the
    products of linears have in place of fp32's: float64, or operands and results rounded to 16 bits.
    """

    deltas: Mapping[str, Callable[[], Tensor]]
    biases: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    norms: Mapping[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    modules: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    parallel: frozenset[str] = frozenset()
    rows: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    num_token_ids: int = 0
    past: Sequence[tuple[Tensor, Tensor]] = ()
    seen: dict[int, tuple[Tensor, Tensor]] | None = None
    precision: torch.dtype | None = None


_local = threading.local()


def current_or_none() -> PassContext | None:
    """The context of the pass running on this thread, if there is one."""
    return getattr(_local, "context", None)


def current() -> PassContext:
    """The context of the pass running on this thread; an error outside of one."""
    context = current_or_none()
    if context is None:
        raise RuntimeError("base model called outside a forward pass; go through BaseModel.forward or folded_logits")
    return context


@contextmanager
def use(context: PassContext) -> Iterator[None]:
    """Run a pass under ``context`` on this thread; passes do not nest."""
    if current_or_none() is not None:
        raise RuntimeError("a forward pass is already running on this thread")
    _local.context = context
    try:
        yield
    finally:
        _local.context = None
