"""Fold a prefix into K and V of whole KV blocks; and what the proof puts before its tokens instead.

A prefix of K and V (prefix tuning, cartridges) is only laid out anew. Input embeddings (prompt tuning and its kin) are
run through the base once, in float32, and leave their K and V: with causal attention these depend on nothing that
follows. Where the base's rope depends on the sequence's length, there is a set for each regime. The embeddings are kept
beside their K and V: in a composition these are others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from deltaserve.deltas.folded_file import FileDamaged
from deltaserve.errors import Reason
from deltaserve_kernels import BLOCK_SIZE
from deltaserve_store.prefix_deltas import KeyValuePrefix, PrefixDelta, PromptPrefix

if TYPE_CHECKING:
    from deltaserve_store.spec import BaseSpec

PREFIX = "kv-prefix"
"""Its name in a folded file, which no module of a base has."""


class PromptBase(Protocol):
    """The part of ``BaseModel`` that runs virtual tokens."""

    @property
    def num_kv_regimes(self) -> int: ...

    def prompt_kv(self, embeddings: Tensor, regime: int = 0) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PrefixTerm:
    """K and V of positions 0 .. ``num_tokens`` - 1 in the serving dtype.

    ``pages`` [regimes, blocks, num_layers, 2, kv_heads, 16, head_dim]: per regime, whole blocks as the KV pool holds
    them, zeros behind the last position. ``embeddings`` [``num_tokens``, hidden]: what the base was run over to get
    them, None where K and V were given.
    """

    pages: Tensor
    num_tokens: int
    embeddings: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + (0 if self.embeddings is None else self.embeddings.nbytes)

    def tensors(self) -> dict[str, Tensor]:
        """By the roles they have in a folded file, where given K and V have no rows of embeddings."""
        embeddings = self.pages.new_zeros(0, 0) if self.embeddings is None else self.embeddings
        count = torch.tensor([self.num_tokens], dtype=torch.int32)
        return {"pages": self.pages, "num_tokens": count, "embeddings": embeddings}


def fold_prefix(prefix: PrefixDelta, spec: BaseSpec, dtype: torch.dtype, base: PromptBase | None) -> PrefixTerm:
    """``base`` runs embeddings; without it they are a ``ValueError``, as is a prefix that does not fit ``spec``."""
    count = prefix.num_tokens
    kept: Tensor | None = None
    if isinstance(prefix, KeyValuePrefix):
        layers = prefix.flat.float().reshape(count, spec.num_layers, 2, spec.kv_heads, spec.head_dim)
        stacked = layers.permute(1, 2, 3, 0, 4)[None]
    else:
        if base is None:
            raise ValueError("virtual tokens are run through the base; give the base")
        embeddings = _virtual_tokens(prefix)
        kept = embeddings.to(dtype).contiguous()
        stacked = torch.stack([base.prompt_kv(embeddings, regime) for regime in range(base.num_kv_regimes)]).cpu()
    regimes, num_layers, _, heads, _, size = stacked.shape
    blocks = -(-count // BLOCK_SIZE)
    padded = torch.zeros(regimes, num_layers, 2, heads, blocks * BLOCK_SIZE, size)
    padded[:, :, :, :, :count] = stacked
    pages = padded.unflatten(4, (blocks, BLOCK_SIZE)).permute(0, 4, 1, 2, 3, 5, 6)
    return PrefixTerm(pages.to(dtype).contiguous(), count, kept)


def prefix_overflow(term: PrefixTerm, allowed: str) -> list[Reason]:
    """Embeddings, K or V that are no numbers in the serving dtype."""
    given = term.embeddings is None or bool(torch.isfinite(term.embeddings).all())
    if given and bool(torch.isfinite(term.pages).all()):
        return []
    return [Reason("value_out_of_range", "prefix", "K or V that overflows the serving dtype", allowed)]


def take_prefix(roles: dict[str, Tensor], spec: BaseSpec, dtype: torch.dtype) -> PrefixTerm:
    """The prefix of a folded file, all of ``roles``. Raises ``FileDamaged``."""
    pages, length, embeddings = (roles.pop(role, None) for role in ("pages", "num_tokens", "embeddings"))
    if pages is None or length is None or embeddings is None or roles:
        raise FileDamaged("the prefix is incomplete or has unexpected parts")
    if tuple(length.shape) != (1,) or length.dtype != torch.int32:
        raise FileDamaged(f"the prefix tells its length as {length.dtype} {tuple(length.shape)}")
    count = int(length)
    blocks = -(-count // BLOCK_SIZE)
    page = (spec.num_layers, 2, spec.kv_heads, BLOCK_SIZE, spec.head_dim)
    if count < 1 or pages.dtype != dtype or pages.dim() != 7 or tuple(pages.shape[1:]) != (blocks, *page):
        raise FileDamaged(f"the prefix has {count} positions in pages {pages.dtype} {tuple(pages.shape)}")
    if embeddings.dtype != dtype or tuple(embeddings.shape) not in ((0, 0), (count, spec.hidden_size)):
        raise FileDamaged(f"the prefix has {count} positions of embeddings {tuple(embeddings.shape)}")
    return PrefixTerm(pages, count, embeddings if len(embeddings) else None)


def _virtual_tokens(prefix: PromptPrefix) -> Tensor:
    """fp32 [p, hidden]."""
    embeddings = prefix.embeddings.float()
    if prefix.task_cols is None or prefix.task_rows is None:
        return embeddings
    return embeddings * (prefix.task_cols.float() @ prefix.task_rows.float())


# ---- The oracle: from the file's own tensors, independently of the term ----


@dataclass(frozen=True, slots=True)
class PlainPrefix:
    """fp32. ``embeddings`` [p, hidden] to be put before the tokens' own, or K and V [kv_heads, p, head_dim] of each
    layer to be put before theirs."""

    embeddings: Tensor | None = None
    keys_values: tuple[tuple[Tensor, Tensor], ...] = ()


def plain_prefix(prefix: PrefixDelta, spec: BaseSpec) -> PlainPrefix:
    """As the method's own formula has it."""
    if isinstance(prefix, PromptPrefix):
        embeddings = prefix.embeddings.float().clone()
        if prefix.task_cols is not None and prefix.task_rows is not None:
            ranks = zip(prefix.task_cols.float().unbind(1), prefix.task_rows.float(), strict=True)
            embeddings *= sum((torch.outer(col, row) for col, row in ranks), torch.zeros(()))
        return PlainPrefix(embeddings=embeddings)
    width = spec.kv_heads * spec.head_dim
    parts = prefix.flat.float().split(width, dim=1)  # K of layer 0, V of layer 0, K of layer 1, ...
    heads = [torch.stack(part.split(spec.head_dim, dim=1)) for part in parts]
    return PlainPrefix(keys_values=tuple(zip(heads[::2], heads[1::2], strict=True)))
