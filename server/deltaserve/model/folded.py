"""Folded mode for everything that is not a ``BaseLinear``: norms, embeddings and other small modules in fp32.

A module that owns low-precision parameters is run, in folded mode, as a throw-away copy whose parameters are widened
for that one call. Nothing on the shared module changes, so the engine thread may run it at the same time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.model.context import FoldedContext, current_or_none
from deltaserve.model.linear import BaseLinear


def widen_in_folded_mode(model: nn.Module) -> None:
    """Give every module with own low-precision parameters or buffers a forward that widens them in folded mode."""
    for module in model.modules():
        if isinstance(module, BaseLinear):
            continue
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in own):
            module.__dict__["forward"] = _Widened(module)


class _Widened:
    """The forward of a module: itself in a step, a widened copy in folded mode."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.step = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(current_or_none(), FoldedContext):
            return self.step(*args, **kwargs)
        if isinstance(self.module, nn.Embedding):
            return self._lookup(*args, **kwargs)
        return copy_with(self.module, {}).forward(*args, **kwargs)

    def _lookup(self, ids: Tensor) -> Any:
        """An embedding of a few ids: widen only their rows, and look up row i for the i-th id."""
        rows = self.module.weight[ids.flatten()].float()  # type: ignore[index]
        places = torch.arange(len(rows), device=ids.device).view(ids.shape)
        return copy_with(self.module, {"weight": rows}).forward(places)


def copy_with(module: nn.Module, replaced: dict[str, Tensor]) -> nn.Module:
    """A shallow copy with its own parameters and buffers in fp32; children are shared."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)
    parameters: dict[str, Any] = {}
    for name, parameter in module._parameters.items():
        widened = replaced.get(name, parameter)
        if widened is not None and widened.is_floating_point():
            widened = nn.Parameter(widened.float(), requires_grad=False)
        parameters[name] = widened
    twin.__dict__["_parameters"] = parameters
    twin.__dict__["_buffers"] = {
        name: buffer.float() if buffer is not None and buffer.is_floating_point() else buffer
        for name, buffer in module._buffers.items()
    }
    return twin
