"""An adapter that passed every check: its tensors and the few facts that serving needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from deltaserve_store.added_tokens import AddedToken
from deltaserve_store.block_deltas import BlockDelta, RowsDelta
from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.dense_deltas import DenseDelta, MaskDelta, SignDelta, WholeDelta
from deltaserve_store.prefix_deltas import PrefixDelta
from deltaserve_store.rotation_deltas import RotationDelta
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

Kind = Literal["lora", "sparse", "vector", "rotation", "dense", "bottleneck", "rows", "block", "prefix"]
FileFormat = str
"""``peft-`` and the PEFT type in lower case with dashes, or one of our own formats (``deltaserve-...``)."""


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """``W + scaling * b @ a`` with ``a [r, in_features]`` and ``b [out_features, r]``, in the dtype of the file.

    The orientation is that of ``W [out, in]`` also where the base stores its weight transposed. ``magnitude [out]``:
    the rows of the sum are brought to these norms (DoRA); the base's bias is not. ``dense`` is given where ``a`` and
    ``b`` were converted from another parametrisation: it makes the same delta, float32 ``[out, in]``, by that method's
    own formula from the file's tensors, so that the conversion can be proven like everything else. ``is_exact`` False:
    the two factors are the nearest term of their rank to ``dense``, not that delta itself.
    """

    module: str
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    dense: Callable[[], Tensor] | None = field(default=None, repr=False)
    is_exact: bool = True

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])


@dataclass(frozen=True, slots=True)
class SparseDelta:
    """``W[rows[i], cols[i]] += values[i]``: ``rows`` and ``cols`` int32 ``[k]``, ``values [k]`` in the file's dtype.

    Positions are unique and sorted by row, then column, in the ``[out, in]`` orientation. ``dense``: see ``LoraDelta``.
    """

    module: str
    rows: Tensor
    cols: Tensor
    values: Tensor
    dense: Callable[[], Tensor] | None = field(default=None, repr=False)

    @property
    def num_entries(self) -> int:
        return int(self.values.shape[0])


@dataclass(frozen=True, slots=True)
class WeightDelta:
    """A delta that multiplies the base weight: ``dW = W @ left @ right`` with ``left [in_features, r]`` and ``right [r,
    in_features]`` float32. It becomes a ``LoraDelta`` once the weight is there. ``dense(W)`` is the same delta, float32
    ``[out, in]``, by the method's own formula, for the proof.
    """

    module: str
    left: Tensor
    right: Tensor
    dense: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def rank(self) -> int:
        return int(self.right.shape[0])

    def on(self, weight_of: Callable[[str], Tensor]) -> LoraDelta:
        """``weight_of(module)`` gives the base weight, float32 ``[out, in]``; it is read again for each use of
        ``dense``, so that no copy of the base is kept."""
        b = (weight_of(self.module).double() @ self.left.double()).float()
        return LoraDelta(self.module, self.right, b, 1.0, dense=lambda: self.dense(weight_of(self.module)))


Matrix = LoraDelta | SparseDelta | DenseDelta | WholeDelta | MaskDelta | SignDelta | BlockDelta
"""Deltas that are added to the weight of a linear."""
Delta = Matrix | VectorDelta | NormDelta | RotationDelta | RowsDelta | BottleneckDelta


@dataclass(frozen=True, slots=True)
class FunctionDelta:
    """A delta that is another function of the base weight.

    ``made(W, *parts)`` computes from W and tensors of the file what ``term`` makes a ``LoraDelta`` of, given ``dense``
    too; ``rank`` is the largest that this may have. ``dense(W)`` is as in ``WeightDelta``.
    """

    module: str
    parts: tuple[Tensor, ...]
    rank: int
    made: Callable[..., Tensor] = field(repr=False)
    term: Callable[[Tensor, Callable[[], Tensor]], LoraDelta] = field(repr=False)
    dense: Callable[[Tensor], Tensor] = field(repr=False)

    def on(self, weight_of: Callable[[str], Tensor]) -> LoraDelta:
        """As ``WeightDelta.on``."""
        made = self.made(weight_of(self.module), *self.parts)
        return self.term(made, lambda: self.dense(weight_of(self.module)))


@dataclass(frozen=True, slots=True)
class ResidualDelta:
    """A LoRA that was trained on ``W - W_0``: on the base itself the delta is ``scaling * b @ a - W_0``.

    ``part(W)`` gives the factors of ``W_0``, right ``[r, in]`` and left ``[out, r]``; ``dense(W)`` is as in
    ``WeightDelta``.
    """

    module: str
    a: Tensor
    b: Tensor
    scaling: float
    part: Callable[[Tensor], tuple[Tensor, Tensor]] = field(repr=False)
    dense: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def rank(self) -> int:
        return 2 * int(self.a.shape[0])

    def on(self, weight_of: Callable[[str], Tensor]) -> LoraDelta:
        """As ``WeightDelta.on``. Raises ``AdapterInvalid`` where the base leaves open what ``W_0`` is."""
        right, left = self.part(weight_of(self.module))
        a, b = torch.cat([self.a.float(), right]), torch.cat([self.scaling * self.b.float(), -left], dim=1)
        return LoraDelta(self.module, a, b, 1.0, dense=lambda: self.dense(weight_of(self.module)))


BaseDelta = WeightDelta | FunctionDelta | ResidualDelta
"""Deltas that need the base's weights."""


@dataclass(frozen=True, slots=True)
class ParsedAdapter:
    """Every tensor of the files is in ``deltas`` or ``weight_deltas``, every field of the config is in ``config`` and
    understood.

    ``rank`` is the largest one (None for sparse adapters). ``base_name`` is what a PEFT config says,
    ``base_fingerprint`` what our own files carry. ``chat_template`` names a template of the operator's registry;
    template text is never taken from an adapter. ``invocation_token_ids``: the adapter acts from their last occurrence
    in a prompt on; empty for one that always acts. ``skipped`` lists files that are no part of the adapter. ``prefix``
    stands before a sequence's own tokens. ``added_tokens``: by id, those that the base's tokenizer lacks. ``notes`` are
    told to whoever uploads it.
    """

    kind: Kind
    file_format: FileFormat
    deltas: tuple[Delta, ...]
    config: Mapping[str, Any]
    base_name: str | None
    base_fingerprint: str | None
    rank: int | None
    num_parameters: int
    chat_template: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    invocation_token_ids: tuple[int, ...] = ()
    skipped: tuple[str, ...] = field(default=())
    weight_deltas: tuple[BaseDelta, ...] = ()
    more_kinds: tuple[Kind, ...] = ()
    prefix: PrefixDelta | None = None
    added_tokens: tuple[AddedToken, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """``kind`` and, for a sum of unlike terms, the others."""
        return (self.kind, *self.more_kinds)

    @property
    def num_prefix_tokens(self) -> int:
        """Positions that it takes before a sequence's own tokens."""
        return self.prefix.num_tokens if self.prefix is not None else 0

    @property
    def num_token_ids(self) -> int:
        """Token ids that its sequences may hold, where these are more than the base's; else 0."""
        return self.added_tokens[-1].id + 1 if self.added_tokens else 0

    @property
    def lossy_deltas(self) -> tuple[LoraDelta, ...]:
        """Those whose term is not their method's delta but the nearest of its rank."""
        return tuple(delta for delta in self.deltas if isinstance(delta, LoraDelta) and not delta.is_exact)

    def on_base(self, weight_of: Callable[[str], Tensor]) -> ParsedAdapter:
        """The same adapter with its ``weight_deltas`` turned into low-rank ``deltas``; see ``WeightDelta.on``."""
        if not self.weight_deltas:
            return self
        converted = tuple(delta.on(weight_of) for delta in self.weight_deltas)
        return replace(self, deltas=(*self.deltas, *converted), weight_deltas=())
