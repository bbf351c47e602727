"""Decoder layers whose residual adds cost nothing: the products of attention and MLP add onto the stream themselves.

A layer of two norms, attention and a gated MLP, each fused (see ``fuse``), is run beside

    h = x + attention(first norm(x));  h + mlp(second norm(h))

in fp32, and which norm is first is seen from the order of its calls. Where both agree, a step adds onto one tensor in
place from layer to layer. It is not the tensor that the first layer was given, so nobody else's numbers change; a model
that used a layer's output once more below its own norm would be refused by ``verify``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.model.context import ForwardContext, current_or_none
from deltaserve.model.fuse import PROBE_ROWS, FusedAttention, FusedGated, FusedNorm, agree, kind_of, random
from deltaserve_kernels import cpu

logger = logging.getLogger(__name__)

# A layer's children in the order of their calls.
_ROLES = (FusedNorm, FusedAttention, FusedNorm, FusedGated)


def fuse_layers(model: nn.Module) -> None:
    """Give decoder layers that can have it the forward described above. For a model that ``fuse`` has seen.

    The CPU's operators multiply by reordered weights, which have no product that adds: layers there stay as they are.
    """
    proven: dict[object, tuple[str, ...] | None] = {}
    for name, layer in model.named_modules():
        if not _has_parts(layer):
            continue
        key = kind_of(layer)
        if key not in proven:
            proven[key] = _prove(layer)
            logger.debug("%s %s residuals by its products", name, "adds" if proven[key] else "does not add")
        names = proven[key]
        if names is not None:
            layer.__dict__["forward"] = FusedLayer(layer, names)


def _fused(module: nn.Module) -> Any:
    return module.__dict__.get("forward")


def _has_parts(layer: nn.Module) -> bool:
    """Whether the layer is nothing but the four parts, all of them fused for other operators than the CPU's."""
    if layer._parameters or layer._buffers:
        return False
    forwards = [_fused(child) for child in layer.children()]
    found = sorted(type(forward).__name__ for forward in forwards)
    return found == sorted(role.__name__ for role in _ROLES) and all(f.operators.module is not cpu for f in forwards)


def _prove(layer: nn.Module) -> tuple[str, ...] | None:
    """Names of the children in the order of their calls, if the layer is the formula above."""
    children = dict(layer.named_children())
    norm = next(_fused(child) for child in children.values() if isinstance(_fused(child), FusedNorm))
    head_dim = next(_fused(child).head_dim for child in children.values() if isinstance(_fused(child), FusedAttention))
    device = norm.operators.device
    x = random(1, PROBE_ROWS, len(norm.weight), device=device)
    turn = tuple(random(2, 1, PROBE_ROWS, head_dim, device=device))
    calls: list[str] = []

    def run() -> Tensor:
        handles = [
            child.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
            for name, child in children.items()
        ]
        try:
            output = layer.forward(x, position_embeddings=turn, attention_mask=None)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(output, Tensor):
            raise TypeError(f"it returns a {type(output).__name__}")
        if tuple(type(_fused(children[name])) for name in calls) != _ROLES:
            raise ValueError(f"it calls {', '.join(calls)}")
        return output

    def formula() -> Tensor:
        first, attention, second, mlp = (children[name] for name in calls)
        h = x + attention(first(x), position_embeddings=turn, attention_mask=None)[0]
        return h + mlp(second(h))

    return tuple(calls) if agree(layer, run, formula) else None


class FusedLayer:
    """The forward of a layer whose children, by order of calls, have the given names."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...]) -> None:
        self.otherwise = layer.forward
        first, attention, second, mlp = (layer.get_submodule(name) for name in names)
        # Norms by their modules: adapters that change them go around the forward they have now.
        self.first, self.second = first, second
        self.attention: FusedAttention = _fused(attention)
        self.mlp: FusedGated = _fused(mlp)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        ctx = current_or_none()
        turn = kwargs.get("position_embeddings")
        if not isinstance(ctx, ForwardContext) or args or not self.attention.serves(hidden_states, turn):
            return self.otherwise(hidden_states, *args, **kwargs)
        total = hidden_states
        if total is not ctx.stream:
            total = ctx.stream = hidden_states.clone(memory_format=torch.contiguous_format)
        rows = total.view(-1, total.shape[-1])
        self.attention.run(self.first(total), turn, ctx, residual=rows)
        self.mlp.run(self.second(total), ctx, residual=rows)
        return total
