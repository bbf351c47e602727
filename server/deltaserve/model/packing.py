"""Replace the linears of the layers by ``BaseLinear``s over packed groups, freeing the originals as it goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaserve.model.linear import BaseLinear, Member, ProjectionGroup
from deltaserve.model.weight import BaseWeight


def find_linears(prefix: str, layers: nn.ModuleList) -> dict[str, nn.Module]:
    """Every linear of the layers by its path in the model, in order of layers."""
    found: dict[str, nn.Module] = {}
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            if type(module) in (nn.Linear, Conv1D):
                found[f"{prefix}.{index}.{path}"] = module
    return found


def registered_linears(model: nn.Module) -> tuple[str, ...]:
    """Paths of all linears but the head, packed or not, in the order in which the model registers its modules."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, BaseLinear)) and module is not head
    )


def pack(model: nn.Module, prefix: str, num_layers: int, groups: list[tuple[str, ...]]) -> dict[str, BaseLinear]:
    """Pack each group of linears and put the ``BaseLinear``s in their places; returns them by path, in group order.

    Indices run in that order. At any time only one group exists twice in memory.
    """
    packed: dict[str, BaseLinear] = {}
    for names in groups:
        modules = [model.get_submodule(name) for name in names]
        layer = int(names[0].removeprefix(prefix + ".").split(".", 1)[0])
        weights = [_weight(module) for module in modules]
        members, start = [], 0
        for offset, weight in enumerate(weights):
            members.append(Member(len(packed) + offset, start, start + weight.shape[0]))
            start += weight.shape[0]
        group = ProjectionGroup(
            BaseWeight(weights[0] if len(weights) == 1 else torch.cat(weights)),
            _pack_bias(modules, [weight.shape[0] for weight in weights]),
            tuple(members),
            depth=layer / (num_layers - 1) if num_layers > 1 else 0.0,
        )
        for name, module, member in zip(names, modules, members, strict=True):
            is_conv = isinstance(module, Conv1D)
            linear = BaseLinear(name, group, member, transposed=is_conv, has_bias=module.bias is not None)
            packed[name] = linear
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return packed


def wrap_head(model: nn.Module, name: str) -> BaseLinear:
    """Put a ``BaseLinear`` in the head's place; a tied weight stays shared."""
    head = model.get_submodule(name)
    weight = _weight(head)
    # Kept as it is, too: a tied weight is the embedding's, and folded mode reads the head in small pieces.
    group = ProjectionGroup(
        BaseWeight(weight, keep=True), _pack_bias([head], [weight.shape[0]]), (Member(-1, 0, weight.shape[0]),), 1.0
    )
    linear = BaseLinear(name, group, group.members[0], transposed=False, has_bias=head.bias is not None)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, linear)
    return linear


def _weight(module: nn.Module) -> Tensor:
    """The weight of a linear as [out, in]."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(module, Conv1D) else weight


def _pack_bias(modules: list[nn.Module], sizes: list[int]) -> Tensor | None:
    biases: list[Any] = [module.bias for module in modules]
    if all(bias is None for bias in biases):
        return None
    zeros = _weight(modules[0]).new_zeros
    return torch.cat([zeros(size) if bias is None else bias.data for bias, size in zip(biases, sizes, strict=True)])
