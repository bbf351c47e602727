"""What readers of trained token rows share: token ids of a config, matrices with one row a token, names of both ends.

The embedding of the base reads a row for each token, the head multiplies one; where they are tied they are one matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.block_deltas import RowsDelta
from deltaserve_store.findings import Findings
from deltaserve_store.formats.safetensors_header import TensorInfo
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, PEFT_PREFIX, check_dtype, check_shape
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.spec import BaseSpec

MAX_TRAINED_TOKENS = 65_536


def rows_shape(module: str, base: BaseSpec) -> tuple[int, int]:
    """(number of tokens, width) of the embedding or the head."""
    spec = base.vocabulary[module]
    is_embedding = base.embedding is not None and module == base.embedding.name
    return (spec.in_features, spec.out_features) if is_embedding else (spec.out_features, spec.in_features)


def named_matrices(name: str, base: BaseSpec) -> list[str]:
    """Embedding and head, those whose path is ``name`` or ends with ``.name``."""
    return [module for module in base.vocabulary if module == name or module.endswith(f".{name}")]


def tied_head(base: BaseSpec) -> str | None:
    """The head, where it is the embedding's matrix."""
    return base.head.name if base.tied_embeddings and base.head is not None and base.embedding is not None else None


def are_token_ids(value: Any) -> bool:
    """Whether this is a list of integers; ``check_ids`` says more about them."""
    return (
        isinstance(value, list)
        and 0 < len(value) <= MAX_TRAINED_TOKENS
        and all(type(item) is int and abs(item) < 2**31 for item in value)
    )


def check_ids(ids: Sequence[int], base: BaseSpec, where: str, findings: Findings) -> None:
    """Each a token that the base's tokenizer knows, none twice."""
    limit = base.num_tokens or base.vocab_size
    outside = [token for token in ids if not 0 <= token < limit]
    if outside:
        more = "" if base.num_added_tokens else "; tokenizer.json beside the adapter names those that it adds"
        findings.add("index_out_of_range", where, outside[0], f"tokens of the base, 0..{limit - 1}{more}")
    if len(set(ids)) != len(ids):
        twice = next(token for token, count in Counter(ids).items() if count > 1)
        findings.add("duplicate_index", where, f"token {twice} twice", "each token once")


MAX_PADDED_ROWS = 255
"""Rows without a token that a matrix resized to a round number may end in."""


def check_rows(info: TensorInfo, module: str, base: BaseSpec, findings: Findings) -> None:
    """Dtype and shape of a matrix with a row for every token; one that has grown is told apart from a wrong one."""
    check_dtype(info, FLOAT_DTYPES, findings)
    expected = rows_shape(module, base)
    num_more = info.shape[0] - expected[0] if len(info.shape) == 2 and info.shape[1] == expected[1] else 0
    if num_more > (MAX_PADDED_ROWS if base.num_added_tokens else 0):
        named = f"and the {base.num_added_tokens} tokens that the upload names" if base.num_added_tokens else "alone"
        allowed = f"{expected[0]} rows, for the base's tokens {named}; tokenizer.json names those that an adapter adds"
        findings.add("added_tokens", info.name, f"rows for {info.shape[0]} tokens", allowed)
    elif num_more <= 0:
        check_shape(info, expected, "by the base", findings)


def read_rows(tensors: TensorFile, name: str, module: str, base: BaseSpec) -> Tensor:
    """A matrix that passed ``check_rows``, without the rows of no token that it may end in."""
    return tensors.read(name)[: rows_shape(module, base)[0]]


def copies_in(tensors: TensorFile, base: BaseSpec, taken: Collection[str]) -> dict[str, str]:
    """Copies of the base's embedding and head that PEFT may write beside an adapter, by tensor name: the module.

    It does (``save_embedding_layers``) where they are targets, or where the caller asks for it; under the name that the
    matrix has behind the adapter's own modules.
    """
    found = {}
    for module in base.vocabulary:
        for ending in ("weight", "base_layer.weight", "token_adapter.base_layer.weight"):
            name = f"{PEFT_PREFIX}{module}.{ending}"
            if name in tensors.header.tensors and name not in taken:
                found[name] = module
    return found


def sorted_rows(module: str, ids: Sequence[int], values: Tensor) -> RowsDelta:
    """Rows in the order of their tokens; files have them in the order of the config."""
    listed = torch.tensor(list(ids), dtype=torch.int32)
    order = torch.argsort(listed)
    return RowsDelta(module, listed[order], values[order])
