"""Vector terms of a folded adapter: scales and biases of a linear, differences of a norm. fp32 whatever is served,
since a scale near one would lose in 16 bits what the base's own rounding loses; but bfloat16 where that loses nothing,
as of gates that are zero or one and of what was trained in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaserve.deltas.folded_file import FileDamaged
from deltaserve_store.spec import LinearSpec, NormSpec


@dataclass(frozen=True, slots=True)
class VectorTerm:
    """``y := scale * y + bias`` where y is the base's output with the base's bias in it, and ``x := in_scale * x`` for
    the base's product alone. ``scale`` and ``bias`` [out], ``in_scale`` [in], fp32 or bfloat16, the first two of one
    dtype; at least one is given.

    ``bias`` also takes back what ``scale`` does to a base bias that is not to be scaled.
    """

    scale: Tensor | None = None
    bias: Tensor | None = None
    in_scale: Tensor | None = None

    def narrowed(self) -> VectorTerm:
        """The same numbers, of each side in bfloat16 where that holds them all."""
        outputs, inputs = (self.scale, self.bias), (self.in_scale,)
        return VectorTerm(
            *(_narrowed(outputs) if _is_whole(self.scale) else outputs),
            *(_narrowed(inputs) if _is_whole(self.in_scale) else inputs),
        )

    def tensors(self) -> dict[str, Tensor]:
        """By the roles they have in a folded file."""
        named = {"scale": self.scale, "bias": self.bias, "in_scale": self.in_scale}
        return {role: tensor for role, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass(frozen=True, slots=True)
class NormTerm:
    """Differences of a norm's gain and shift, fp32 [H]; at least one is given."""

    gain: Tensor | None = None
    shift: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By the roles they have in a folded file."""
        named = {"gain": self.gain, "shift": self.shift}
        return {role: tensor for role, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def _narrowed(vectors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    narrow = [None if vector is None else vector.bfloat16() for vector in vectors]
    pairs = zip(vectors, narrow, strict=True)
    are_equal = all(given is None or held is None or torch.equal(given, held.to(given.dtype)) for given, held in pairs)
    return narrow if are_equal else vectors


def _is_whole(scale: Tensor | None) -> bool:
    """Whether the factor at strength 1, ``1 + (scale - 1)`` in fp32, is the scale: not of scales next to nothing."""
    return scale is None or torch.equal(1 + (scale.float() - 1), scale.float())


def take_vectors(
    linear: str, roles: dict[str, Tensor], known: LinearSpec, *, is_wide: bool = False
) -> VectorTerm | None:
    """The vector term among a linear's tensors of a folded file, taken out of ``roles``; ``is_wide``: fp32 alone is
    allowed. Raises ``FileDamaged``."""
    sizes = {"scale": known.out_features, "bias": known.out_features, "in_scale": known.in_features}
    taken = _take(linear, roles, sizes, (torch.float32,) if is_wide else (torch.float32, torch.bfloat16))
    if "scale" in taken and "bias" in taken and taken["scale"].dtype != taken["bias"].dtype:
        raise FileDamaged(f"{linear!r} has a scale {taken['scale'].dtype} and a bias {taken['bias'].dtype}")
    return VectorTerm(**taken) if taken else None


def take_norm(name: str, roles: dict[str, Tensor], known: NormSpec) -> NormTerm:
    """The term of a norm, all of ``roles``. Raises ``FileDamaged``."""
    taken = _take(name, roles, {"gain": known.size, "shift": known.size if known.has_bias else -1}, (torch.float32,))
    if roles or not taken:
        raise FileDamaged(f"{name!r} has the unexpected parts {sorted(roles)}")
    return NormTerm(**taken)


def _take(
    name: str, roles: dict[str, Tensor], sizes: Mapping[str, int], dtypes: Sequence[torch.dtype]
) -> dict[str, Tensor]:
    taken = {role: roles.pop(role) for role in sizes if role in roles}
    for role, tensor in taken.items():
        if tensor.dtype not in dtypes or tuple(tensor.shape) != (sizes[role],):
            raise FileDamaged(f"{name!r} has a {role} {tensor.dtype} {tuple(tensor.shape)}")
    return taken
