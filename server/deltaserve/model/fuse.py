"""Modules of the base that run as few operators in a step: RMS norms, gated MLPs, attention with rotary.

transformers writes them as a dozen small operations each. Nothing is replaced because of its name: a module that has
the right parts is run beside the formula in fp32, on random rows, and only where both agree does it get a forward that
uses the operators that the device has at load: the C++ library's, or Triton's. That forward serves steps alone; folded
mode and anything else run the module as it was, and so do steps while another backend than Triton is selected.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaserve.model.attention import AttentionSpec, attend_paged, dense_attention
from deltaserve.model.context import FoldedContext, ForwardContext, current_or_none, use
from deltaserve.model.linear import BaseLinear
from deltaserve.model.norms import TunableForward, TunableNorm
from deltaserve.model.vectors import prepared
from deltaserve_kernels import VectorRows, changed_rms_norm, cpu, pointwise

logger = logging.getLogger(__name__)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
PROBE_ROWS = 3
_TOLERANCE = 1e-5  # relative, fp32


@dataclass(frozen=True)
class Operators:
    """Twins of ``deltaserve_kernels.pointwise`` for the base's device."""

    device: torch.device
    module: ModuleType

    def are_selected(self) -> bool:
        """Whether they are to run now: Triton's step aside for the definition, which then shares nothing with them."""
        return self.module is cpu or pointwise.operators(self.device) is self.module


def make_tunable(norms: Iterable[TunableNorm]) -> None:
    """Let steps and folded passes change the norms. Call it last: it goes around the forward a module has by now."""
    for norm in norms:
        forward: Any = norm.module.forward
        if isinstance(forward, FusedNorm):
            forward.tunable, forward.otherwise = norm, TunableForward(norm, forward.otherwise)
        else:
            norm.module.__dict__["forward"] = TunableForward(norm, forward)


def fuse(model: nn.Module) -> None:
    """Give what can be fused its forward. For a base whose linears and attention are ours already."""
    device = next(model.parameters()).device
    module_of_operators = pointwise.operators(device)
    if module_of_operators is None:
        return
    operators = Operators(device, module_of_operators)
    proven: dict[object, Any] = {}
    for name, module in model.named_modules():
        make = _maker(module)
        if make is None:
            continue
        key = kind_of(module)
        if key not in proven:
            proven[key] = make(module, operators)
            logger.debug("%s %s as one operator", name, "runs" if proven[key] else "does not run")
        if proven[key] is not None:
            module.__dict__["forward"] = proven[key](module)


def _maker(module: nn.Module) -> Callable[[nn.Module, Operators], Any] | None:
    """What might fuse such a module: returns a factory of forwards, or None when the module is something else."""
    if _has_linears(module, ("q_proj", "k_proj", "v_proj"), "o_proj") and "deltaserve_attention" in module.__dict__:
        return _prove_attention
    if _has_linears(module, ("gate_proj", "up_proj"), "down_proj"):
        return _prove_gated
    weight = module._parameters.get("weight")
    if len(module._parameters) == 1 and not module._buffers and weight is not None and weight.dim() == 1:
        return _prove_norm if _eps_of(module) is not None else None
    return None


def _has_linears(module: nn.Module, inward: Sequence[str], outward: str) -> bool:
    """Whether ``inward`` are, in this order, all members of one group, and ``outward`` is a group of its own."""
    linears: list[Any] = [getattr(module, name, None) for name in (*inward, outward)]
    if not all(isinstance(linear, BaseLinear) for linear in linears):
        return False
    *first, last = linears
    members = tuple((linear.index, linear.start, linear.stop) for linear in first)
    return tuple(map(tuple, first[0].group.members)) == members and len(last.group.members) == 1


def kind_of(module: nn.Module) -> object:
    """Modules of one kind compute the same function of their weights: one proof serves them all."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "layer_idx"}
    spec = module.__dict__.get("deltaserve_attention")
    parts = tuple((name, type(child)) for name, child in module.named_children())
    return type(module), tuple(sorted(plain.items())), parts, spec and (spec.scale, spec.window, spec.softcap)


def agree(module: nn.Module, found: Callable[[], Tensor], wanted: Callable[[], Tensor]) -> bool:
    try:
        with torch.inference_mode(), use(FoldedContext(deltas={})):
            a, b = found(), wanted()
    except Exception as error:  # whatever this module is, it is not called in the way that was tried
        logger.debug("%s is left as it is: %s", type(module).__name__, error)
        return False
    return a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * b.norm())


def random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


# ---------------------------------------------------------------- norms


def _eps_of(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


def _prove_norm(module: nn.Module, operators: Operators) -> Callable[[nn.Module], Any] | None:
    weight, eps = module._parameters["weight"], _eps_of(module)
    if weight is None or eps is None:
        return None
    x = 2 * random(PROBE_ROWS, len(weight), device=operators.device)

    def formula(offset: float) -> Callable[[], Tensor]:
        return lambda: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight.float())

    for offset in (0.0, 1.0):
        if agree(module, lambda: module.forward(x), formula(offset)):
            return partial(FusedNorm, operators=operators, eps=eps, offset=offset)
    return None


class FusedNorm:
    def __init__(self, module: nn.Module, operators: Operators, eps: float, offset: float) -> None:
        self.otherwise, self.operators = module.forward, operators
        self.weight: Tensor = module.weight.data  # type: ignore[assignment]
        self.eps, self.offset = eps, offset
        self.tunable: TunableNorm | None = None

    def __call__(self, x: Tensor) -> Tensor:
        ctx = current_or_none()
        if not isinstance(ctx, ForwardContext) or x.dtype is not self.weight.dtype or not self.operators.are_selected():
            return self.otherwise(x)
        rows = x.reshape(-1, x.shape[-1])
        norm, step = self.tunable, ctx.vectors
        if isinstance(step, VectorRows):
            if norm is not None and step.may_have(step.family.norms, (norm.index,)):
                y = changed_rms_norm(rows, self.weight, self.eps, self.offset, norm.gain, step, norm.index, norm.depth)
                return y.view(x.shape)
            step = None
        if norm is None or step is None or not step.family.norms.has_any(norm.index):
            return self.operators.module.rms_norm(rows, self.weight, self.eps, self.offset).view(x.shape)
        if self.operators.module is cpu:
            found = prepared(step).norms
            if found is not None:
                y = cpu.rms_norm_changed(rows, self.weight, self.eps, self.offset, found, norm.index, norm.depth)
                return y.view(x.shape)
        y = self.operators.module.rms_norm(rows, self.weight, self.eps, self.offset).view(x.shape)
        norm.adjust(y, x, step)
        return y


# ---------------------------------------------------------------- gated MLPs


def _prove_gated(module: Any, operators: Operators) -> Callable[[nn.Module], Any] | None:
    x = random(1, PROBE_ROWS, module.gate_proj.in_features, device=operators.device)
    if module.gate_proj.out_features != module.up_proj.out_features:
        return None
    for name, function in _ACTIVATIONS.items():
        wanted = lambda f=function: module.down_proj(f(module.gate_proj(x)) * module.up_proj(x))  # noqa: E731
        if agree(module, lambda: module.forward(x), wanted):
            return partial(FusedGated, operators=operators, activation=name)
    return None


class FusedGated:
    def __init__(self, module: Any, operators: Operators, activation: str) -> None:
        self.otherwise, self.operators = module.forward, operators
        self.gate_up, self.down = module.gate_proj.group, module.down_proj.group
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        ctx = current_or_none()
        if not isinstance(ctx, ForwardContext) or not self.operators.are_selected():
            return self.otherwise(x)
        return self.run(x, ctx).view(*x.shape[:-1], -1)

    def run(self, x: Tensor, ctx: ForwardContext, residual: Tensor | None = None) -> Tensor:
        """``x`` [1, T, H] -> [T, H]; ``residual`` as in ``ProjectionGroup.apply``."""
        both = self.gate_up.apply(x.reshape(-1, x.shape[-1]), ctx)
        return self.down.apply(self.operators.module.gated_product(both, self.activation), ctx, residual)


# ---------------------------------------------------------------- attention


def _prove_attention(module: Any, operators: Operators) -> Callable[[nn.Module], Any] | None:
    spec: AttentionSpec = module.__dict__["deltaserve_attention"]
    size = getattr(module, "head_dim", None)
    widths = [module.q_proj.out_features, module.k_proj.out_features, module.v_proj.out_features]
    if not isinstance(size, int) or size % 2 or any(width % size for width in widths) or widths[1] != widths[2]:
        return None
    x = random(1, PROBE_ROWS, module.q_proj.in_features, device=operators.device)
    cos, sin = random(2, 1, PROBE_ROWS, size, device=operators.device)

    def run() -> Tensor:
        output, weights = module.forward(x, position_embeddings=(cos, sin), attention_mask=None)
        if weights is not None:
            raise ValueError("it returns attention weights")
        return output

    def formula() -> Tensor:
        q, k, v = (
            linear(x).view(PROBE_ROWS, -1, size).transpose(0, 1)[None]
            for linear in (module.q_proj, module.k_proj, module.v_proj)
        )
        q, k = (each * cos[:, None] + _half_turn(each) * sin[:, None] for each in (q, k))
        return module.o_proj(dense_attention(q, k, v, spec).reshape(1, PROBE_ROWS, -1))

    return partial(FusedAttention, operators=operators, head_dim=size) if agree(module, run, formula) else None


def _half_turn(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)


class FusedAttention:
    def __init__(self, module: Any, operators: Operators, head_dim: int) -> None:
        self.otherwise, self.operators = module.forward, operators
        self.spec: AttentionSpec = module.__dict__["deltaserve_attention"]
        self.qkv, self.out = module.q_proj.group, module.o_proj.group
        self.heads, self.head_dim = module.q_proj.out_features // head_dim, head_dim

    def serves(self, hidden_states: Tensor, turn: tuple[Tensor, Tensor] | None) -> bool:
        """The proof rotated whole heads: where the base rotates a part of them, it says nothing. ``turn``: cos, sin."""
        if turn is None or not self.operators.are_selected():
            return False
        return all(
            angles.dtype is hidden_states.dtype and angles.shape[-1] == self.head_dim and angles.stride(-1) == 1
            for angles in turn
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        ctx = current_or_none()
        turn = kwargs.get("position_embeddings")
        if not isinstance(ctx, ForwardContext) or args or not self.serves(hidden_states, turn):
            return self.otherwise(hidden_states, *args, **kwargs)
        return self.run(hidden_states, turn, ctx).view(*hidden_states.shape[:-1], -1), None

    def run(self, x: Tensor, turn: Any, ctx: ForwardContext, residual: Tensor | None = None) -> Tensor:
        """``x`` [1, T, H] -> [T, H]; ``residual`` as in ``ProjectionGroup.apply``."""
        spec = self.spec
        qkv = self.qkv.apply(x.reshape(-1, x.shape[-1]), ctx)
        k_cache, v_cache = ctx.kv.k(spec.layer), ctx.kv.v(spec.layer)
        self.operators.module.rotate_and_store(qkv, turn[0][0], turn[1][0], k_cache, v_cache, ctx.kv_index)
        queries = qkv[:, : self.heads * self.head_dim].view(-1, self.heads, self.head_dim)
        attended = attend_paged(queries, spec, ctx)
        return self.out.apply(attended.view(len(qkv), -1), ctx, residual)
