"""Damaged adapters of row and column blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from deltaserve_store.block_deltas import BlockDelta
from deltaserve_store.formats.deltaserve_blocks import write_block_adapter
from deltatest.adapter_corpus import FINGERPRINT, Q0, BadAdapter, edit_config, edit_tensors, set_value

JSON, TENSORS = "adapter.json", "adapter.safetensors"
DOWN1, V0 = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj"


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def write_good_blocks(folder: Path) -> Path:
    """Rows of one linear, columns of another, both of a third."""
    deltas = (
        BlockDelta(Q0, ints(0, 3, 15), None, torch.ones(3, 16)),
        BlockDelta(DOWN1, None, ints(1, 23), torch.ones(16, 2)),
        BlockDelta(V0, ints(2, 7), ints(0, 4, 5), torch.ones(2, 3)),
    )
    write_block_adapter(folder, deltas, FINGERPRINT, base_name="tests/corpus-base", method="s2ft")
    return folder


def _case(name: str, spoil: Any, *reasons: tuple[str, str], is_exact: bool = True) -> BadAdapter:
    return BadAdapter(name, "blocks", spoil, reasons, is_exact, write_good_blocks)


def _tensor(name: str, code: str, where: str, value: Any, *, is_exact: bool = True) -> BadAdapter:
    """One tensor replaced (None: taken away)."""
    return _case(name, edit_tensors({where: value}, TENSORS), (code, where), is_exact=is_exact)


def _field(field: str, value: Any, code: str, *, is_exact: bool = True) -> BadAdapter:
    name = f"config {field}={json.dumps(None if value is ... else value)[:40]}"
    return _case(name, edit_config(JSON, **{field: value}), (code, f"{JSON}:{field}"), is_exact=is_exact)


def _module(name: str, code: str, module: str, lists: Any) -> BadAdapter:
    modules = {Q0: ["rows"], DOWN1: ["cols"], V0: ["rows", "cols"]}
    spoil = edit_config(JSON, modules={**modules, module: lists})
    return _case(name, spoil, (code, f"{JSON}:modules:{module}"), is_exact=False)


BLOCK_CORPUS: tuple[BadAdapter, ...] = (
    _tensor("block missing", "missing_tensor", f"{Q0}.block", None),
    _tensor("list missing", "missing_tensor", f"{Q0}.rows", None, is_exact=False),
    _tensor("a row too few", "shape_mismatch", f"{Q0}.block", torch.ones(2, 16)),
    _tensor("a column too many", "shape_mismatch", f"{DOWN1}.block", torch.ones(16, 3)),
    _tensor("a block turned", "shape_mismatch", f"{DOWN1}.block", torch.ones(2, 16)),
    _tensor("a block without its second dimension", "shape_mismatch", f"{V0}.block", torch.ones(6)),
    _tensor("more rows than there are", "shape_mismatch", f"{V0}.rows", torch.arange(9).int(), is_exact=False),
    _tensor("a list of no rows", "shape_mismatch", f"{Q0}.rows", ints(), is_exact=False),
    _case(
        "a block of nothing",
        edit_tensors({f"{V0}.rows": ints(), f"{V0}.block": torch.ones(0, 3)}, TENSORS),
        ("shape_mismatch", f"{V0}.rows"),
        is_exact=False,
    ),
    _tensor("a list of two dimensions", "shape_mismatch", f"{Q0}.rows", torch.ones(3, 1).int(), is_exact=False),
    _tensor("a row outside", "index_out_of_range", f"{Q0}.rows", ints(0, 3, 16)),
    _tensor("a row below zero", "index_out_of_range", f"{Q0}.rows", ints(-1, 3, 15)),
    _tensor("a column outside", "index_out_of_range", f"{DOWN1}.cols", ints(1, 24)),
    _tensor("columns out of order", "unsorted_index", f"{V0}.cols", ints(4, 0, 5)),
    _tensor("a column twice", "duplicate_index", f"{V0}.cols", ints(0, 5, 5)),
    _tensor("a list of int64", "unsupported_dtype", f"{Q0}.rows", ints(0, 3, 15).long()),
    _tensor("a list of floats", "unsupported_dtype", f"{Q0}.rows", ints(0, 3, 15).float()),
    _tensor("an integer block", "unsupported_dtype", f"{V0}.block", torch.ones(2, 3).int()),
    _tensor("NaN", "non_finite", f"{V0}.block", set_value(float("nan"))),
    _tensor("a huge value", "value_out_of_range", f"{V0}.block", set_value(1e20)),
    _tensor("a list not announced", "unexpected_tensor", f"{Q0}.cols", ints(0, 1)),
    _tensor("a tensor of no listed module", "unexpected_tensor", "model.norm.block", torch.ones(2, 3)),
    _field("base_fingerprint", "cd" * 32, "base_mismatch"),
    _field("format_version", 2, "invalid_value"),
    _field("scale", 2.0, "unknown_field"),
    _field("modules", {}, "target_not_found", is_exact=False),
    _field("modules", [Q0], "invalid_value", is_exact=False),
    _module("a linear the base does not have", "unknown_module", "model.layers.9.mlp.down_proj", ["rows"]),
    _module("a block of the head", "unsupported_target", "lm_head", ["rows"]),
    _module("a linear without lists", "invalid_value", Q0, []),
    _module("a list that no linear has", "invalid_value", Q0, ["heads"]),
    _module("a list twice", "invalid_value", Q0, ["rows", "rows"]),
    _module("lists that are no list", "invalid_value", Q0, 3),
)
