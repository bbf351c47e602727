"""Damaged adapters of the PEFT types that turn inputs or outputs: what can only go wrong with them. The damage that
every type gets is in ``kind_corpus``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deltatest.adapter_corpus import CONFIG, PREFIX, BadAdapter, edit_config, edit_tensors
from deltatest.kind_corpus import TARGETED, V0, V0_TENSOR

_OFT, _BOFT = f"{V0_TENSOR}.oft_R.weight", f"{V0_TENSOR}.boft_R"
_EVERY_OFT = [f"{PREFIX}model.layers.{layer}.self_attn.{name}.oft_R.weight" for layer in range(2) for name in TARGETED]


def _far() -> torch.Tensor:
    """One block of 16 with angles so near 180 degrees, beside small ones, that 24 bits hold no rotation of it."""
    values = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) * 3e4
    values[4:] *= 1e-4
    rows, cols = torch.triu_indices(16, 16, 1)
    return (values - values.t())[rows, cols].clamp(-6e4, 6e4)[None]


def _far_everywhere(folder: Path) -> None:
    edit_config(oft_block_size=16)(folder)
    edit_tensors({name: _far() for name in _EVERY_OFT})(folder)


def _config(kind: str, field: str, value: Any, code: str) -> BadAdapter:
    name = f"config {field}={json.dumps(value) if value is not ... else 'missing'}"
    return BadAdapter(name, kind, edit_config(**{field: value}), ((code, f"{CONFIG}:{field}"),))


def _among(kind: str, name: str, spoil: Callable[[Path], None], reason: tuple[str, str]) -> BadAdapter:
    """The reason is one of several: a wrong size misshapes every tensor."""
    return BadAdapter(name, kind, spoil, (reason,), is_exact=False)


ROTATION_CORPUS: tuple[BadAdapter, ...] = (
    *(
        _config("oft", field, ..., "missing_field")
        for field in ("r", "coft", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
    ),
    _config("oft", "r", -1, "invalid_value"),
    _config("oft", "eps", "much", "invalid_value"),
    _config("oft", "eps", -1, "invalid_value"),
    _config("oft", "coft", 1, "invalid_value"),
    _config("oft", "num_cayley_neumann_terms", 0, "invalid_value"),
    _config("oft", "num_cayley_neumann_terms", 65, "invalid_value"),
    _config("oft", "fan_in_fan_out", True, "fan_in_fan_out_mismatch"),
    BadAdapter("both sizes", "oft", edit_config(r=4), (("invalid_value", f"{CONFIG}:oft_block_size"),)),
    BadAdapter("no size", "oft", edit_config(oft_block_size=0), (("invalid_value", f"{CONFIG}:oft_block_size"),)),
    _among("oft", "blocks of one", edit_config(oft_block_size=1), ("rank_out_of_range", V0)),
    _among("oft", "as many blocks as inputs", edit_config(oft_block_size=0, r=16), ("rank_out_of_range", V0)),
    _among("oft", "another block size", edit_config(oft_block_size=8), ("shape_mismatch", _OFT)),
    _among("oft", "shared, says the config", edit_config(block_share=True), ("shape_mismatch", _OFT)),
    BadAdapter(
        "a rotation too far to be one in float32",
        "oft",
        _far_everywhere,
        (("invalid_value", _EVERY_OFT[0]),),
    ),
    _config("road", "variant", "road_3", "invalid_value"),
    _config("road", "variant", ..., "missing_field"),
    _config("road", "group_size", 3, "invalid_value"),
    _config("road", "group_size", 6, "invalid_value"),
    _config("road", "group_size", 0, "invalid_value"),
    _config("road", "fan_in_fan_out", False, "unknown_field"),
    _among("road", "another variant", edit_config(variant="road_4"), ("shape_mismatch", f"{V0_TENSOR}.road_theta")),
    _config("boft", "boft_n_butterfly_factor", 0, "invalid_value"),
    _config("boft", "boft_n_butterfly_factor", ..., "missing_field"),
    _config("boft", "boft_n_butterfly_factor", 4, "invalid_value"),
    _config("boft", "boft_block_size", 3, "invalid_value"),
    BadAdapter("both sizes", "boft", edit_config(boft_block_num=4), (("invalid_value", f"{CONFIG}:boft_block_size"),)),
    _among("boft", "another block size", edit_config(boft_block_size=8), ("shape_mismatch", _BOFT)),
    _among("boft", "more factors", edit_config(boft_n_butterfly_factor=3), ("shape_mismatch", _BOFT)),
)
