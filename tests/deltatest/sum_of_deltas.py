"""The oracle of a composition: the base's own weights, in fp32, plus the sum of the parts' deltas."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaserve.core import Binding, BindingPart
from deltaserve.deltas.fold import dense_deltas
from deltaserve.deltas.vectors import dense_biases, dense_norms
from deltaserve.model.base import BaseModel
from deltaserve_store.formats import read_adapter

Strength = float | tuple[float, float]
Parts = tuple[tuple[str, Strength], ...]


def binding_of(parts: Parts, start_position: int = 0) -> Binding:
    return Binding(tuple(BindingPart(name, *_ends(strength), start_position) for name, strength in parts))


def _ends(strength: Strength) -> tuple[float, float]:
    return strength if isinstance(strength, tuple) else (strength, strength)


def summed(model: torch.nn.Module, base: BaseModel, folders: Mapping[str, Path], parts: Parts) -> torch.nn.Module:
    """A copy of ``model`` changed by hand, linear by linear and norm by norm, from the files' own tensors."""
    changed: Any = copy.deepcopy(model)
    num_layers = model.config.num_hidden_layers  # type: ignore[union-attr]

    def at(name: str, strength: Strength) -> float:
        first, last = _ends(strength)
        numbers = [int(word) for word in name.split(".") if word.isdigit()]
        return first + (last - first) * (numbers[0] / (num_layers - 1) if numbers else 1.0)

    with torch.no_grad():
        for name, strength in parts:
            parsed = read_adapter(folders[name], base.spec)
            for linear, delta in dense_deltas(parsed, base.spec, base).items():
                weight = changed.get_submodule(linear).weight
                weight += at(linear, strength) * (delta().t() if base.spec.linears[linear].transposed else delta())
            for linear, difference in dense_biases(parsed, base).items():
                _add_bias(changed.get_submodule(linear), at(linear, strength) * difference())
            for norm, (gain, shift) in dense_norms(parsed, base).items():
                module = changed.get_submodule(norm)
                module.weight += 0.0 if gain is None else at(norm, strength) * gain
                if shift is not None:
                    module.bias += at(norm, strength) * shift
    return changed  # type: ignore[no-any-return]


def _add_bias(module: Any, difference: Tensor) -> None:
    module.bias = torch.nn.Parameter(difference if module.bias is None else module.bias + difference)


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: Sequence[int]) -> Tensor:
    """Float32 [T, vocab]."""
    logits: Tensor = model.eval()(torch.tensor([list(ids)])).logits[0]
    return logits.float()
