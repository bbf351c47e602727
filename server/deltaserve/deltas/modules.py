"""Fold residual modules (bottlenecks at attach points): Houlsby et al., arXiv:1902.00751; He et al., arXiv:2110.04366.

``scale * (up phi(down h + down_bias) + up_bias)``: the scale goes into ``up`` and ``up_bias`` in fp32. A strength s
means s times the module's output, whatever is inside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaserve.deltas.folded_file import FileDamaged
from deltaserve.errors import Reason
from deltaserve_store.bottleneck_deltas import ACTIVATIONS, BottleneckDelta
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec


@dataclass(frozen=True, slots=True)
class ModuleTerm:
    """``h += up_t.T @ phi(down @ x + down_bias) + up_bias``, x the h itself or, parallel, the sublayer's input.

    ``down`` and ``up_t`` [r, H] in the serving dtype, biases fp32 or None.
    """

    down: Tensor
    up_t: Tensor
    activation: str
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    is_parallel: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """By the roles they have in a folded file."""
        named = {"down": self.down, "up_t": self.up_t, "down_bias": self.down_bias, "up_bias": self.up_bias}
        return {role: tensor for role, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def fold_modules(
    parsed: ParsedAdapter, spec: BaseSpec, dtype: torch.dtype, reasons: list[Reason]
) -> dict[str, ModuleTerm]:
    """Terms by attach point, sorted; what does not fit is added to ``reasons``."""
    terms: dict[str, ModuleTerm] = {}
    deltas = [delta for delta in parsed.deltas if isinstance(delta, BottleneckDelta)]
    for delta in sorted(deltas, key=lambda delta: delta.point):
        if delta.point not in spec.points:
            reasons.append(Reason("unknown_module", delta.point, "a residual module", "an attach point of the base"))
        elif delta.point in terms:
            reasons.append(Reason("duplicate_module", delta.point, "two modules", "one module per attach point"))
        elif misfit := _misfit(delta, spec.hidden_size):
            reasons.append(misfit)
        else:
            term = terms[delta.point] = _fold(delta, dtype)
            for role, tensor in term.tensors().items():
                if not bool(torch.isfinite(tensor).all()):
                    where = f"{delta.point} ({role})"
                    allowed = f"magnitudes up to {torch.finfo(tensor.dtype).max:g}"
                    reasons.append(Reason("value_out_of_range", where, "values that overflow", allowed))
    return terms


def _misfit(delta: BottleneckDelta, size: int) -> Reason | None:
    rank = delta.down.shape[0]
    wanted = {"down": (rank, size), "up": (size, rank), "down_bias": (rank,), "up_bias": (size,)}
    for part, shape in wanted.items():
        tensor: Tensor | None = getattr(delta, part)
        if tensor is not None and tuple(tensor.shape) != shape:
            return Reason("shape_mismatch", f"{delta.point} ({part})", str(tuple(tensor.shape)), str(shape))
    return None


def _fold(delta: BottleneckDelta, dtype: torch.dtype) -> ModuleTerm:
    return ModuleTerm(
        down=delta.down.to(dtype).contiguous(),
        up_t=(delta.up.float() * delta.scale).t().to(dtype).contiguous(),
        activation=delta.activation,
        down_bias=None if delta.down_bias is None else delta.down_bias.float().contiguous(),
        up_bias=None if delta.up_bias is None else (delta.up_bias.float() * delta.scale).contiguous(),
        is_parallel=delta.is_parallel,
    )


def take_module(point: str, roles: dict[str, Tensor], told: object, size: int, dtype: torch.dtype) -> ModuleTerm:
    """The term of an attach point from its tensors of a folded file and what the metadata tell of it: its activation
    and whether it is parallel. Raises ``FileDamaged``."""
    down = roles.get("down")
    rank = down.shape[0] if down is not None and down.dim() == 2 else 0
    matrix, narrow = ((rank, size), dtype), torch.float32
    forms = {"down": matrix, "up_t": matrix, "down_bias": ((rank,), narrow), "up_bias": ((size,), narrow)}
    if not rank or "up_t" not in roles or not set(roles) <= set(forms):
        raise FileDamaged(f"{point!r} has the unexpected parts {sorted(roles)}")
    for role, tensor in roles.items():
        if (tuple(tensor.shape), tensor.dtype) != forms[role]:
            raise FileDamaged(f"{point!r} has a {role} {tensor.dtype} {tuple(tensor.shape)}")
    if not isinstance(told, list) or len(told) != 2 or told[0] not in ACTIVATIONS or type(told[1]) is not bool:
        raise FileDamaged(f"{point!r} has no activation and placement")
    biases = roles.get("down_bias"), roles.get("up_bias")
    return ModuleTerm(roles["down"], roles["up_t"], told[0], *biases, is_parallel=told[1])


# ---- The oracle: an ordinary fp32 module made of the file's own tensors ----

_LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


class Bottleneck(nn.Module):
    """One residual module as it was trained; gives what is added."""

    def __init__(self, delta: BottleneckDelta) -> None:
        super().__init__()
        self.down = _linear(delta.down, delta.down_bias)
        self.activation = _LAYERS[delta.activation]()
        self.up = _linear(delta.up, delta.up_bias)
        self.scale = delta.scale

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.scale * self.up(self.activation(self.down(hidden)))
        return out


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.float(), requires_grad=False)
    return linear


def plain_modules(parsed: ParsedAdapter) -> dict[str, Bottleneck]:
    """Modules by attach point."""
    return {delta.point: Bottleneck(delta) for delta in parsed.deltas if isinstance(delta, BottleneckDelta)}


def parallel_points(parsed: ParsedAdapter) -> frozenset[str]:
    """Points whose module reads the sublayer's input."""
    return frozenset(d.point for d in parsed.deltas if isinstance(d, BottleneckDelta) and d.is_parallel)
