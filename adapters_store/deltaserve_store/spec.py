"""What an adapter must fit: the base model's linears, by name and shape, and the identity of its bytes.

A ``BaseSpec`` is plain data: whoever loads the base makes one, everything that checks adapters reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

_FIRST_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear of the base: ``y = x W^T + b`` with ``W`` of ``[out_features, in_features]``.

    ``name`` is the module path in the transformers model, e.g. ``model.layers.0.self_attn.q_proj``. ``transposed`` is
    True where the checkpoint holds the weight as ``[in_features, out_features]`` (GPT-2's Conv1D).
    """

    name: str
    out_features: int
    in_features: int
    has_bias: bool = False
    transposed: bool = False

    @property
    def layer(self) -> int | None:
        """Index of the decoder layer: the first number in the path; None outside the layers (``lm_head``)."""
        found = _FIRST_NUMBER.search(self.name)
        return int(found.group(1)) if found else None

    @property
    def narrow(self) -> int:
        """Size of the narrower side: no delta has a larger rank."""
        return min(self.out_features, self.in_features)


@dataclass(frozen=True, slots=True)
class NormSpec:
    """One norm of the base that adapters may change: ``weight`` [size], and ``bias`` [size] where it has one."""

    name: str
    size: int
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base model as adapters see it.

    ``fingerprint`` identifies config, weights, tokenizer and template by content. ``names`` are the names under which
    this base is known, the served id first. ``vocab_size`` is the number of rows of the embedding; ``num_tokens`` the
    number of tokens the tokenizer knows, where that is known (checkpoints pad the embedding). ``points`` are where
    residual modules may be attached, all of ``hidden_size``. A layer's K and V of one position are ``kv_heads`` times
    ``head_dim`` each; 0 where nobody asked the base, and no prefix can be checked.

    ``embedding`` is a linear from token ids (``in_features`` the vocabulary) and ``head`` one to logits
    (``out_features`` the vocabulary); neither is among ``linears``. None where adapters cannot change them.

    ``registered``: every linear of the model but the head, also those that are not among ``linears``, in the order in
    which the model registers its modules. PEFT numbers modules by it. Empty where nobody asked the model.

    ``num_added_tokens``: see ``with_added_tokens``; 0 for a base as it is.
    """

    fingerprint: str
    names: tuple[str, ...]
    model_type: str
    linears: Mapping[str, LinearSpec]
    vocab_size: int
    num_layers: int
    hidden_size: int
    tied_embeddings: bool = False
    num_tokens: int | None = None
    norms: Mapping[str, NormSpec] = field(default_factory=dict)
    points: frozenset[str] = frozenset()
    embedding: LinearSpec | None = None
    head: LinearSpec | None = None
    kv_heads: int = 0
    head_dim: int = 0
    registered: tuple[str, ...] = ()
    num_added_tokens: int = 0

    @property
    def first_added_token(self) -> int:
        """The id that a token added to the base's tokenizer gets first."""
        return self.num_tokens or self.vocab_size

    def with_added_tokens(self, count: int) -> BaseSpec:
        """The base as an adapter with ``count`` more tokens has seen it: with a row for each of them in embedding and
        head, where padding has left none."""
        if not count:
            return self
        size = self.first_added_token + count
        embedding, head = self.embedding, self.head
        return replace(
            self,
            vocab_size=max(self.vocab_size, size),
            num_tokens=size,
            embedding=None if embedding is None else replace(embedding, in_features=max(embedding.in_features, size)),
            head=None if head is None else replace(head, out_features=max(head.out_features, size)),
            num_added_tokens=count,
        )

    @property
    def vocabulary(self) -> dict[str, LinearSpec]:
        """Embedding and head by name, those that adapters can change."""
        return {spec.name: spec for spec in (self.embedding, self.head) if spec is not None}
