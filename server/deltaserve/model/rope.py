"""Rotary embeddings: refuse the kinds that mix rows, and choose longrope factors per row.

transformers picks longrope's short or long frequencies once for the whole batch, by its longest row, and stores them in
the module. Here both sets are evaluated and each row takes its own, by the length of its sequence (``kv_regimes``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deltaserve.errors import UnsupportedBase
from deltaserve.model.context import current

# Kinds whose frequencies depend on the row's own position only.
ROW_INDEPENDENT = frozenset({"default", "linear", "llama3", "yarn"})


def check_rope(config: PreTrainedConfig) -> int | None:
    """Refuse rope kinds that cannot be served; return the length above which longrope changes its frequencies."""
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    for kind in [entry.get("rope_type", "default") for entry in per_layer_type or [parameters]]:
        if kind == "dynamic":
            raise UnsupportedBase(
                "rope type 'dynamic' picks frequencies by the longest row of a batch, so rows would change each other; "
                f"served: {', '.join(sorted(ROW_INDEPENDENT))}, longrope"
            )
        if kind not in ROW_INDEPENDENT and not (kind == "longrope" and not per_layer_type):
            raise UnsupportedBase(
                f"rope type {kind!r} is not served; served: {', '.join(sorted(ROW_INDEPENDENT))}, longrope"
            )
    if parameters.get("rope_type") != "longrope":
        return None
    limit = parameters.get("original_max_position_embeddings")
    if not isinstance(limit, int):
        raise UnsupportedBase("longrope without original_max_position_embeddings is not served")
    return limit


def choose_longrope_per_row(model: PreTrainedModel, limit: int) -> None:
    """Replace the forward of every longrope module of ``model`` by one that serves each row its own frequencies."""
    found = False
    for module in model.modules():
        if getattr(module, "rope_type", None) != "longrope" or not isinstance(
            getattr(module, "inv_freq", None), Tensor
        ):
            continue
        config = module.config
        make = ROPE_INIT_FUNCTIONS["longrope"]
        device = module.inv_freq.device
        short, short_scaling = make(config, device, seq_len=limit)
        long, long_scaling = make(config, device, seq_len=limit + 1)
        module.__dict__["forward"] = _PerRow(_fixed(module, short, short_scaling), _fixed(module, long, long_scaling))
        found = True
    if not found:
        raise UnsupportedBase("the configuration asks for longrope but no module of the model applies it")


def _fixed(module: nn.Module, inv_freq: Tensor, scaling: float) -> nn.Module:
    """A copy of a rotary module that always uses ``inv_freq``: transformers' own formula, no switching."""
    fixed = copy.deepcopy(module)
    fixed.rope_type = "default"  # type: ignore[assignment]
    fixed.inv_freq = inv_freq
    fixed.attention_scaling = scaling  # type: ignore[assignment]
    return fixed


class _PerRow:
    """The forward of a longrope module; holds its two fixed copies out of the module tree."""

    def __init__(self, short: nn.Module, long: nn.Module) -> None:
        self.short, self.long = short, long

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """``position_ids`` [1, T] -> cos, sin [1, T, rotary size]."""
        cos, sin = self.short(x, position_ids, *args, **kwargs)
        regimes = current().kv_regimes
        if regimes is None:
            return cos, sin
        is_long = (regimes > 0)[None, :, None]
        long_cos, long_sin = self.long(x, position_ids, *args, **kwargs)
        return torch.where(is_long, long_cos, cos), torch.where(is_long, long_sin, sin)
