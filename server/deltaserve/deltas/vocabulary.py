"""Fold what an adapter does to the embedding and the head: low rank, and trained rows as differences of some rows.

A trained row stands in place of the base's; its difference is taken in float32 and cast once, so that a strength s
gives ``base + s * difference``. Of a matrix that the file holds whole (``modules_to_save``) only rows that differ from
the base's become part of the term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from deltaserve.deltas.folded_file import FileDamaged
from deltaserve.errors import Reason
from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.parsed import LoraDelta, ParsedAdapter
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import VectorDelta

ROWS_AT_ONCE = 4096
MAX_ROWS_BYTES = 256 * 1024 * 1024
"""Of the trained rows of one matrix, in the serving dtype."""


@dataclass(frozen=True, slots=True)
class RowsTerm:
    """Differences of rows of the embedding or the head: ``ids`` int32 [k], strictly ascending, and ``values``
    [k, width] in the serving dtype."""

    ids: Tensor
    values: Tensor

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.values.nbytes


class TokenRows(Protocol):
    """The part of ``BaseModel`` that folding reads here: rows of the embedding or the head as stored, by token."""

    def token_rows(self, name: str, ids: Tensor) -> Tensor: ...


def matrix_size(spec: BaseSpec, name: str) -> tuple[int, int]:
    """(number of tokens, width) of the embedding or the head; raises KeyError."""
    linear = spec.vocabulary[name]
    is_embedding = spec.embedding is not None and spec.embedding.name == name
    return (linear.in_features, linear.out_features) if is_embedding else (linear.out_features, linear.in_features)


def is_of_vocabulary(delta: object, spec: BaseSpec) -> bool:
    return isinstance(delta, RowsDelta) or (
        isinstance(delta, LoraDelta | VectorDelta) and delta.module in spec.vocabulary
    )


def needs_token_rows(parsed: ParsedAdapter) -> bool:
    return any(isinstance(delta, RowsDelta) for delta in parsed.deltas)


def trained_tokens(parsed: ParsedAdapter, base: TokenRows) -> list[int]:
    """Tokens whose rows the adapter changes, ascending; low rank, which changes all, does not count."""
    found: set[int] = set()
    for delta in parsed.deltas:
        if isinstance(delta, RowsDelta) and not delta.is_copy:
            for i in range(0, len(delta.values), ROWS_AT_ONCE):
                given = delta.values[i : i + ROWS_AT_ONCE]
                tokens = torch.arange(i, i + len(given)) if delta.ids is None else delta.ids[i : i + len(given)].long()
                differs = (given.float() != base.token_rows(delta.module, tokens).float().cpu()).any(dim=1)
                found.update(tokens[differs].tolist())
    return sorted(found)


def fold_rows(
    deltas: Sequence[RowsDelta],
    spec: BaseSpec,
    dtype: torch.dtype,
    base: TokenRows,
    reasons: list[Reason],
    num_token_ids: int = 0,
) -> dict[str, RowsTerm]:
    """Trained rows by matrix. What does not fit the base is added to ``reasons``. ``num_token_ids``: the tokens of an
    adapter that adds some."""
    terms: dict[str, RowsTerm] = {}
    for delta in deltas:
        if delta.module not in spec.vocabulary:
            reasons.append(Reason("unknown_module", delta.module, "trained rows", "the embedding or head of the base"))
            continue
        if misfit := _misfit(delta, spec, num_token_ids):
            reasons.append(misfit)
        elif delta.is_copy:
            reasons.extend(_check_copy(delta, base))
        elif delta.module in terms:
            reasons.append(Reason("duplicate_module", delta.module, "two sets of rows", "one for each matrix"))
        elif (term := _fold_rows(delta, matrix_size(spec, delta.module)[0], dtype, base, reasons)) is not None:
            terms[delta.module] = term
    return terms


def _misfit(delta: RowsDelta, spec: BaseSpec, num_token_ids: int) -> Reason | None:
    num_rows, width = matrix_size(spec, delta.module)
    num_rows = num_rows if delta.is_copy else max(num_rows, num_token_ids)
    count = num_rows if delta.ids is None else delta.ids.numel()
    if tuple(delta.values.shape) != (count, width):
        return Reason("shape_mismatch", delta.module, str(tuple(delta.values.shape)), str((count, width)))
    if delta.ids is None:
        return None
    if not count or int(delta.ids.min()) < 0 or int(delta.ids.max()) >= num_rows:
        return Reason("index_out_of_range", delta.module, f"{delta.ids.tolist()[:8]}", f"tokens 0..{num_rows - 1}")
    if bool((delta.ids.diff() <= 0).any()):
        return Reason("unsorted_index", delta.module, f"{delta.ids.tolist()[:8]}", "strictly ascending tokens")
    return None


def _check_copy(delta: RowsDelta, base: TokenRows) -> list[Reason]:
    """A copy may be of another precision than what is served."""
    num_changed = 0
    for i in range(0, len(delta.values), ROWS_AT_ONCE):
        given = delta.values[i : i + ROWS_AT_ONCE]
        stored = base.token_rows(delta.module, torch.arange(i, i + len(given))).cpu()
        is_same = (given.to(stored.dtype) == stored) | (stored.to(given.dtype) == given)
        num_changed += int((~is_same.all(dim=1)).sum())
    if not num_changed:
        return []
    allowed = "an unchanged copy of the base's; trained ones belong in modules_to_save or trainable_token_indices"
    return [Reason("base_mismatch", delta.module, f"{num_changed} rows differ from the base's", allowed)]


def _fold_rows(
    delta: RowsDelta, num_rows: int, dtype: torch.dtype, base: TokenRows, reasons: list[Reason]
) -> RowsTerm | None:
    """``num_rows``: of the base's matrix; tokens beyond are added ones, whose rows are kept whatever is in them."""
    width = delta.values.shape[1]
    most = MAX_ROWS_BYTES // (width * dtype.itemsize)
    kept, ids, count = [], [], 0
    for i in range(0, len(delta.values), ROWS_AT_ONCE):
        given = delta.values[i : i + ROWS_AT_ONCE]
        tokens = torch.arange(i, i + len(given)) if delta.ids is None else delta.ids[i : i + len(given)].long()
        stored = base.token_rows(delta.module, tokens).cpu()
        differs = (given.to(stored.dtype) != stored).any(dim=1)
        chosen = differs | (tokens >= num_rows) if delta.ids is None else torch.ones_like(differs)
        count += int(chosen.sum())
        if count > most:
            continue  # counted to the end for the refusal
        kept.append((given[chosen].float() - stored[chosen].float()).to(dtype))
        ids.append(tokens[chosen].int())
    if count > most:
        allowed = (
            f"at most {most} changed rows ({MAX_ROWS_BYTES >> 20} MiB); train chosen tokens "
            "(trainable_token_indices) or a LoRA of the matrix instead"
        )
        reasons.append(Reason("file_too_large", delta.module, f"{count} rows differ from the base's", allowed))
        return None
    if not count:
        return None
    term = RowsTerm(torch.cat(ids), torch.cat(kept))
    if not bool(torch.isfinite(term.values).all()):
        found = "differences that overflow the serving dtype"
        reasons.append(Reason("value_out_of_range", f"{delta.module} (rows)", found, f"finite values in {dtype}"))
        return None
    return term


def take_rows(
    name: str, roles: dict[str, Tensor], spec: BaseSpec, dtype: torch.dtype, num_token_ids: int = 0
) -> RowsTerm | None:
    """The trained rows among a matrix's tensors of a folded file, taken out of ``roles``. Raises ``FileDamaged``."""
    if "ids" not in roles or "row_values" not in roles:
        return None
    ids, values = roles.pop("ids"), roles.pop("row_values")
    num_tokens, width = matrix_size(spec, name)
    num_tokens = max(num_tokens, num_token_ids)
    if ids.dtype != torch.int32 or ids.dim() != 1 or values.dtype != dtype or not ids.numel():
        raise FileDamaged(f"{name!r} has rows {ids.dtype} {tuple(ids.shape)} and {values.dtype}")
    if tuple(values.shape) != (ids.numel(), width):
        raise FileDamaged(f"{name!r} has rows {tuple(values.shape)} of {ids.numel()} tokens, {width} wide")
    if int(ids[0]) < 0 or int(ids[-1]) >= num_tokens or bool((ids.diff() <= 0).any()):
        raise FileDamaged(f"{name!r} has rows of tokens outside 0..{num_tokens - 1} or out of order")
    return RowsTerm(ids, values)


# ---- The oracle: from the file's own tensors, independently of the terms ----


def row_changes(parsed: ParsedAdapter, spec: BaseSpec, base: TokenRows) -> Mapping[str, Callable[[Tensor], Tensor]]:
    """By matrix a function of token ids int64 [n] that gives the differences of their rows, fp32 [n, width]."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in spec.vocabulary:
        own = [d for d in parsed.deltas if isinstance(d, LoraDelta | RowsDelta) and d.module == name]
        if any(not (isinstance(delta, RowsDelta) and delta.is_copy) for delta in own):
            changes[name] = partial(_change, own, spec, name, base)
    return changes


def _change(deltas: Sequence[LoraDelta | RowsDelta], spec: BaseSpec, name: str, base: TokenRows, ids: Tensor) -> Tensor:
    ids = ids.cpu()
    stored = base.token_rows(name, ids).float().cpu()
    after = stored.clone()
    is_embedding = spec.embedding is not None and spec.embedding.name == name
    for delta in deltas:
        if isinstance(delta, LoraDelta):
            # Rows of the head are rows of B A, those of the embedding its columns.
            a, b = delta.a.float(), delta.b.float()
            after += delta.scaling * ((b @ a[:, ids]).t() if is_embedding else b[ids] @ a)
            if delta.magnitude is not None:
                own = delta.magnitude.float().flatten()
                if is_embedding:
                    after = after * (own / _norms_over_tokens(delta, base, matrix_size(spec, name)[0]))
                else:
                    after = after * (own[ids] / after.norm(dim=1))[:, None]
        elif not delta.is_copy:
            known = torch.arange(len(delta.values)) if delta.ids is None else delta.ids.long()
            place = torch.full((1 + int(torch.cat((known, ids)).max()),), -1)
            place[known] = torch.arange(len(known))
            hits = place[ids] >= 0
            after[hits] = delta.values[place[ids][hits]].float()
    return after - stored


def _norms_over_tokens(delta: LoraDelta, base: TokenRows, num_tokens: int) -> Tensor:
    """fp32 [width]: norms of the columns of the embedding with its low rank, a few tokens at a time."""
    a, b = delta.a.float(), delta.b.float()
    total = torch.zeros(b.shape[0], dtype=torch.float64)
    for i in range(0, num_tokens, ROWS_AT_ONCE):
        ids = torch.arange(i, min(i + ROWS_AT_ONCE, num_tokens))
        changed = base.token_rows(delta.module, ids).float().cpu() + delta.scaling * (b @ a[:, ids]).t()
        total += changed.double().square().sum(dim=0)
    return total.sqrt().float()
