"""Rows of embedding and head for the tokens that an adapter adds.

They come with the rows it has trained, with a matrix that it holds whole, or with the copy of the resized matrix that
PEFT writes when the vocabulary has grown. What the base's matrix has room for (checkpoints are padded) may be left out;
beyond that each token needs a row at both ends, and a tied head takes the embedding's. A head with a bias cannot grow:
what number a new token has there is in some of PEFT's files alone (transformers fills in the mean of the others, or 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deltaserve_store.added_tokens import AddedToken
from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.file_names import PEFT_CONFIG
from deltaserve_store.findings import Findings
from deltaserve_store.formats.activated_lora import check_alone
from deltaserve_store.formats.vocabulary_rows import rows_shape, sorted_rows, tied_head
from deltaserve_store.parsed import Delta, LoraDelta, ParsedAdapter
from deltaserve_store.spec import BaseSpec


def check_head_bias(tokens: Sequence[AddedToken], base: BaseSpec, findings: Findings) -> None:
    """Tokens beyond the rows of a head with a bias, which has no number for them, are a finding."""
    head = base.head
    if not tokens or head is None or not head.has_bias:
        return
    room = head.out_features - base.first_added_token
    if len(tokens) > room:
        beyond = len(tokens) - max(0, room)
        found = f"{len(tokens)} added tokens, {beyond} beyond the {head.out_features} numbers of its bias"
        allowed = f"at most {room} added tokens" if room > 0 else "tokens of the base"
        findings.add("added_tokens", head.name, found, f"{allowed}: a head with a bias keeps its size")


def with_added_tokens(
    parsed: ParsedAdapter, tokens: Sequence[AddedToken], base: BaseSpec, findings: Findings
) -> ParsedAdapter:
    """``parsed`` was read against ``base.with_added_tokens(len(tokens))``. Rows that are missing are findings."""
    size = base.first_added_token + len(tokens)
    if not tokens:
        return parsed
    if size > base.vocab_size and (base.embedding is None or base.head is None):
        found = f"{size - base.vocab_size} tokens more than rows"
        findings.add("added_tokens", "tokenizer", found, "tokens of the base: its embedding or head cannot be changed")
        return parsed
    deltas: list[Delta] = [delta for delta in parsed.deltas if not isinstance(delta, RowsDelta)]
    copies = {d.module: d.values for d in parsed.deltas if isinstance(d, RowsDelta) and d.is_copy}
    trained = {d.module: d for d in parsed.deltas if isinstance(d, RowsDelta) and not d.is_copy}
    low_rank = {delta.module for delta in deltas if isinstance(delta, LoraDelta)}
    head = tied_head(base)
    for module in base.vocabulary:
        added = range(rows_shape(module, base)[0], size)
        copied = copies.get(module)
        if copied is not None:
            deltas.append(RowsDelta(module, None, copied[: added.start], is_copy=True))
        elif module == head and base.embedding is not None:
            copied = copies.get(base.embedding.name)  # the same matrix, as it was before anything was trained
        if not added:
            deltas += [trained[module]] if module in trained else []
            continue
        if module in low_rank:
            allowed = "trained rows of a matrix that grows (trainable_token_indices or modules_to_save)"
            findings.add("unsupported_feature", module, "low rank and added tokens", allowed)
        rows = _joined(module, trained.get(module), None if copied is None else copied[added.start :], added)
        if rows is not None:
            deltas.append(rows)
        if missing := _missing(rows, added):
            found = f"no row for token {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            allowed = "a row for every added token (PEFT writes them with save_embedding_layers=True)"
            findings.add("missing_tensor", module, found, allowed)
    if parsed.invocation_token_ids:
        has_rows = any(isinstance(delta, RowsDelta) and not delta.is_copy for delta in deltas)
        check_alone(PEFT_CONFIG, findings, rows_of_added_tokens=has_rows)
    return replace(parsed, deltas=tuple(deltas), added_tokens=tuple(tokens))


def _joined(module: str, trained: RowsDelta | None, copied: Tensor | None, added: range) -> RowsDelta | None:
    """The trained rows, and beside them those of ``added`` tokens that only the copy of the matrix has."""
    if copied is None or (trained is not None and trained.ids is None):
        return trained
    known = set() if trained is None or trained.ids is None else set(trained.ids.tolist())
    others = [token for token in added if token not in known]
    values = copied[[token - added.start for token in others]]
    if trained is None or trained.ids is None:
        return sorted_rows(module, others, values)
    dtype = torch.promote_types(trained.values.dtype, values.dtype)
    both = torch.cat([trained.values.to(dtype), values.to(dtype)])
    return sorted_rows(module, [*trained.ids.tolist(), *others], both)


def _missing(rows: RowsDelta | None, needed: range) -> list[int]:
    if rows is None:
        return list(needed)
    known = set(range(len(rows.values)) if rows.ids is None else rows.ids.tolist())
    return [token for token in needed if token not in known]
