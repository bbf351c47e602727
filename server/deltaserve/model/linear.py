"""BaseLinear, the only way to base weights, and ProjectionGroup, linears that are fed the same tensor.

A group owns one packed weight ``[sum of out, in]`` (Conv1D's file layout, ``[in, out]``, is turned at load). The member
called first computes the slices of all members, adapter terms included; the others return theirs. Order inside a group
is fixed: base product, then LoRA, then sparse, then blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaserve.model.attach import Ends, apply_apart, folded_input, folded_output
from deltaserve.model.blocks import add_blocks
from deltaserve.model.context import FoldedContext, ForwardContext, JoinedTerms, PassContext, current
from deltaserve.model.vector_rows import apply_rows
from deltaserve.model.vectors import Joining, apply_one_by_one
from deltaserve.model.weight import BaseWeight
from deltaserve_kernels import VectorRows, VectorStep, WorkList, change_head, sparse_linear, widened

# Folded mode widens weights piece by piece; a piece holds at most this many elements (64 MiB in fp32).
MAX_FOLDED_ELEMENTS = 16 * 1024 * 1024


class Member(NamedTuple):
    """A linear inside its group: index in ``BaseModel.linears`` and its columns of the group's output."""

    linear: int
    start: int
    stop: int


class ProjectionGroup:
    """``weight`` [N, K] and ``bias`` [N] or None of the members in call order; ``depth`` runs 0..1 over the layers."""

    def __init__(self, weight: BaseWeight, bias: Tensor | None, members: tuple[Member, ...], depth: float) -> None:
        self.weight = weight
        self.bias = bias
        self.members = members
        self.depth = depth
        self.ends = Ends()
        packed = weight.joins_vectors(members)
        self.joining = None if packed is None else Joining(packed, bias, members, depth)

    def apply(self, rows: Tensor, ctx: ForwardContext, residual: Tensor | None = None) -> Tensor:
        """``rows`` [T, K] -> [T, N]: base product plus the adapter terms of the step's work list.

        With ``residual`` [T, N] all of that is added to it in place, and it is returned.
        """
        work, found = ctx.work, ctx.found.get(self)
        if work is None or found is False or work.is_empty:
            return self.weight.matmul(rows, self.bias, residual)
        if found is not None and found.is_all and residual is None and self.joining is not None:
            return self.joining.product(rows, found.terms)
        if ctx.apart is not None:
            return apply_apart(self, rows, work, ctx, ctx.apart, residual)
        return self.apply_terms(rows, work, ctx, residual)

    def apply_terms(self, rows: Tensor, work: WorkList, ctx: ForwardContext, residual: Tensor | None = None) -> Tensor:
        """``apply`` of the base product and every term that is one operator for the whole step."""
        if isinstance(ctx.vectors, VectorRows):
            return apply_rows(self, rows, work, ctx, ctx.vectors, residual)
        vectors = ctx.vectors
        with_vectors = None if vectors is None else self._with_vectors(rows, work, ctx, vectors)
        if vectors is not None and with_vectors is not None:
            has_more = self._add_terms(with_vectors, rows, work, ctx)
            found = ctx.found.get(self)
            if found and not has_more and ctx.apart is None:
                ctx.found[self] = JoinedTerms(found.terms, is_all=True)
            if residual is None:
                return with_vectors
            # All other rows take the product that adds onto the stream: it rounds once, and so do they in any step.
            changed = vectors.rows
            own = residual[changed] + with_vectors[changed]
            total = self.apply_terms(rows, work, replace(ctx, vectors=None, found={}), residual)
            total[changed] = own
            return total
        lora = ctx.lora
        has_low_rank = lora is not None and work.concerns(lora, self.members)
        if lora is not None and has_low_rank:
            y = self.weight.matmul_lora(rows, self.bias, work, lora, self.members, self.depth, residual)
        else:
            y = self.weight.matmul(rows, self.bias, residual)
        has_more = self._add_terms(y, rows, work, ctx)
        if not has_low_rank and not has_more and ctx.apart is None:
            ctx.found[self] = False
        return y

    def apply_both(self, rows: Tensor, work: WorkList, ctx: ForwardContext, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``apply_terms`` without and with ``residual``, to the bit, from one product where that gives both."""
        if ctx.vectors is not None:
            return self.apply_terms(rows, work, ctx), self.apply_terms(rows, work, ctx, residual)
        lora = ctx.lora if ctx.lora is not None and work.concerns(ctx.lora, self.members) else None
        both = self.weight.matmul_both(rows, self.bias, work, lora, self.members, self.depth, residual)
        for y in both:
            self._add_terms(y, rows, work, ctx)
        return both

    def _with_vectors(self, rows: Tensor, work: WorkList, ctx: ForwardContext, step: VectorStep) -> Tensor | None:
        """Base product, vectors and low rank [T, N]; None where the product is that of a step without vectors."""
        if self.joining is None:
            return apply_one_by_one(self, rows, ctx, step)
        found = ctx.found.get(self)
        if not found:
            terms = self.joining.terms(work, ctx.lora, step)
            if terms is None:
                return None
            ctx.found[self] = found = JoinedTerms(terms, is_all=False)
        return self.joining.product(rows, found.terms)

    def _add_terms(self, y: Tensor, rows: Tensor, work: WorkList, ctx: ForwardContext) -> bool:
        """What comes after low rank, in place; whether there is any."""
        sparse = ctx.sparse
        has_sparse = sparse is not None and work.concerns(sparse, self.members)
        if sparse is not None and has_sparse:
            sparse_linear(y, rows, work, sparse, self.members, self.depth)
        if ctx.blocks is None:
            return has_sparse
        return add_blocks(y, rows, work, ctx.blocks, self.members, self.depth) or has_sparse


class BaseLinear(nn.Module):
    """One frozen linear of the base: a slice of its group's packed weight.

    ``transposed`` tells that the checkpoint stores it as ``[in, out]`` (Conv1D). ``index`` is its place in
    ``BaseModel.linears``; -1 for the head, whose terms are of the rows that get logits.
    """

    def __init__(self, name: str, group: ProjectionGroup, member: Member, *, transposed: bool, has_bias: bool) -> None:
        super().__init__()
        self.name = name
        self.index = member.linear
        self.group = group
        self.start, self.stop = member.start, member.stop
        self.out_features = member.stop - member.start
        self.in_features = group.weight.shape[1]
        self.transposed = transposed
        self.has_bias = has_bias
        self._others = tuple(other for other in group.members if other.linear != member.linear)
        self._is_alone = not self._others

    @property
    def weight(self) -> Tensor:
        """The base weight [out, in] in its stored dtype; may be made anew at each use."""
        return self.group.weight.plain()[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """The base bias [out], a view, or None."""
        return self.group.bias[self.start : self.stop] if self.has_bias and self.group.bias is not None else None

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j of the base weight as float32 [j - i, in]; folding reads weights through this alone."""
        return self.weight[i:j].float()

    def matmul(self, x: Tensor) -> Tensor:
        """The base alone: ``x`` [..., in] -> [..., out], bias included."""
        y = self.group.weight.matmul(x.reshape(-1, self.in_features), self.group.bias)
        return y[:, self.start : self.stop].reshape(*x.shape[:-1], self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        ctx = current()
        if isinstance(ctx, ForwardContext):
            return self._step(x, ctx)
        return self._folded(x, ctx)

    def _step(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        if self.index < 0:
            y = self.matmul(x)
            if ctx.vocabulary is not None:
                y = widened(y.reshape(-1, self.out_features), ctx.vocabulary)
                change_head(y, x.reshape(-1, self.in_features), ctx.vocabulary, self.out_features)
                y = y.view(*x.shape[:-1], y.shape[-1])
            return y
        rows = x.reshape(-1, self.in_features)
        if self._is_alone:
            return self.group.apply(rows, ctx).view(*x.shape[:-1], self.out_features)
        waiting = ctx.pending.pop(self.index, None)
        if waiting is None or not _is_same(waiting[0], rows):
            y = self.group.apply(rows, ctx)
            for other in self._others:
                ctx.pending[other.linear] = (rows, y[:, other.start : other.stop])
            result = y[:, self.start : self.stop]
        else:
            result = waiting[1]
        return result.view(*x.shape[:-1], self.out_features)

    def _folded(self, x: Tensor, ctx: PassContext) -> Tensor:
        """``x @ (W + dW).T + bias`` in fp32, widening one piece of the weight at a time."""
        make_delta = ctx.deltas.get(self.name) if isinstance(ctx, FoldedContext) else None
        delta = None if make_delta is None else make_delta()
        if delta is not None and delta.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"delta of {self.name} is {list(delta.shape)}; needed: {[self.out_features, self.in_features]}"
            )
        make_rows = ctx.rows.get(self.name) if isinstance(ctx, FoldedContext) else None
        x = x.float()
        if isinstance(ctx, FoldedContext) and ctx.modules:
            x = folded_input(self.group, x, ctx)
        precision = ctx.precision if isinstance(ctx, FoldedContext) else None
        step = max(1, MAX_FOLDED_ELEMENTS // self.in_features)
        stored = self.weight
        pieces = []
        for i in range(0, self.out_features, step):
            weight = stored[i : i + step].float()
            if delta is not None:
                weight = weight + delta[i : i + step].to(weight)
            if make_rows is not None:
                weight = weight + make_rows(torch.arange(i, i + len(weight))).to(weight)
            pieces.append(_product(x, weight, precision))
        if make_rows is not None and isinstance(ctx, FoldedContext) and ctx.num_token_ids > self.out_features:
            added = make_rows(torch.arange(self.out_features, ctx.num_token_ids)).to(x)
            pieces.append(_product(x, added, precision))
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        bias = self.bias
        y = y if bias is None else y + bias.float()
        make_bias = ctx.biases.get(self.name) if isinstance(ctx, FoldedContext) else None
        y = y if make_bias is None else y + make_bias().to(y)
        return folded_output(self.group, y, ctx) if isinstance(ctx, FoldedContext) and ctx.modules else y

    def extra_repr(self) -> str:
        return f"{self.name}, in_features={self.in_features}, out_features={self.out_features}"


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two row matrices are the same memory, so that a waiting result belongs to this input."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _product(x: Tensor, weight: Tensor, precision: torch.dtype | None) -> Tensor:
    """``x @ weight.T``, fp32 in and out, as ``FoldedContext.precision`` wants it."""
    if precision is None:
        return F.linear(x, weight)
    if precision == torch.float64:
        return F.linear(x.double(), weight.double()).float()
    return F.linear(x.to(precision).float(), weight.to(precision).float()).to(precision).float()
