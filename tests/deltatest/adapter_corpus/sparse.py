"""SHiRA and the project's own sparse format: positions out of range, twice or out of order."""

from __future__ import annotations

import json
from typing import Any

import torch

from deltatest.adapter_corpus.good import PREFIX, Q0
from deltatest.adapter_corpus.spoil import BadAdapter, config_case, edit_config, edit_tensors, set_value, tensor_case


def _set_last_row(indices: torch.Tensor, value: int) -> torch.Tensor:
    indices = indices.clone()
    indices[0, -1] = value
    return indices


def _repeat_first(indices: torch.Tensor) -> torch.Tensor:
    indices = indices.clone()
    indices[:, 1] = indices[:, 0]
    return indices


_V0 = f"{PREFIX}model.layers.0.self_attn.v_proj"

SHIRA = (
    BadAdapter(
        "another r than the tensors",
        "shira",
        edit_config(r=3),
        tuple(
            ("shape_mismatch", f"{PREFIX}model.layers.{layer}.self_attn.v_proj.shira_{part}")
            for layer in range(2)
            for part in ("indices", "weight")
        ),
    ),
    config_case("modules_to_save", ["lm_head"], "unknown_module", kind="shira"),
    config_case("rank_pattern", {}, "unknown_field", kind="shira"),
    tensor_case(
        "indices missing", "missing_tensor", {f"{_V0}.shira_indices": None}, f"{_V0}.shira_indices", kind="shira"
    ),
    tensor_case(
        "values cut", "shape_mismatch", {f"{_V0}.shira_weight": torch.ones(7)}, f"{_V0}.shira_weight", kind="shira"
    ),
    tensor_case(
        "row beyond the layer",
        "index_out_of_range",
        {f"{_V0}.shira_indices": lambda i: _set_last_row(i, 8)},
        f"{_V0}.shira_indices",
        kind="shira",
    ),
    tensor_case(
        "negative row",
        "index_out_of_range",
        {f"{_V0}.shira_indices": lambda i: _set_last_row(i, -1)},
        f"{_V0}.shira_indices",
        kind="shira",
    ),
    tensor_case(
        "a position twice",
        "duplicate_index",
        {f"{_V0}.shira_indices": lambda i: _repeat_first(i)},
        f"{_V0}.shira_indices",
        kind="shira",
    ),
    tensor_case(
        "NaN in SHiRA",
        "non_finite",
        {f"{_V0}.shira_weight": set_value(float("nan"))},
        f"{_V0}.shira_weight",
        kind="shira",
    ),
)


SPARSE_JSON = "adapter.json"
SPARSE = "adapter.safetensors"


def _json(field: str, value: Any, code: str, *, name: str = "") -> BadAdapter:
    shown = name or f"{field}={json.dumps(value)[:40]}"
    spoil = edit_config(SPARSE_JSON, **{field: value})
    return BadAdapter(f"sparse {shown}", "sparse", spoil, ((code, f"{SPARSE_JSON}:{field}"),))


def _sparse(
    name: str, code: str, where: str, *, rows: list[int] | None = None, cols: list[int] | None = None
) -> BadAdapter:
    changes: dict[str, Any] = {f"{Q0}.rows": torch.tensor(rows or [0, 0, 1, 2, 3], dtype=torch.int32)}
    changes[f"{Q0}.cols"] = torch.tensor(cols or [0, 1, 2, 3, 4], dtype=torch.int32)
    return BadAdapter(name, "sparse", edit_tensors(changes, SPARSE), ((code, where),))


OWN_SPARSE = (
    _json("base_fingerprint", "cd" * 32, "base_mismatch"),
    _json("base_fingerprint", ..., "missing_field", name="without fingerprint"),
    _json("base_fingerprint", 7, "invalid_value"),
    _json("format", "somebody-else", "unsupported_kind"),
    _json("format_version", 2, "invalid_value"),
    _json("format_version", True, "invalid_value"),
    _json("chat_template", "{{ messages }}", "invalid_value"),
    _json("stop_token_ids", [100], "invalid_value"),
    _json("stop_token_ids", list(range(17)), "invalid_value"),
    _json("scale", 2.0, "unknown_field"),
    BadAdapter(
        "no modules",
        "sparse",
        edit_config(SPARSE_JSON, modules={}),
        (("target_not_found", f"{SPARSE_JSON}:modules"), ("unexpected_tensor", f"{Q0}.rows")),
        is_exact=False,
    ),
    BadAdapter(
        "a module the base does not have",
        "sparse",
        edit_config(SPARSE_JSON, modules={Q0: 5, "model.layers.1.self_attn.q_proj": 5, "model.norm": 5}),
        (("unknown_module", f"{SPARSE_JSON}:modules:model.norm"),),
    ),
    BadAdapter(
        "the head",
        "sparse",
        edit_config(SPARSE_JSON, modules={Q0: 5, "model.layers.1.self_attn.q_proj": 5, "lm_head": 5}),
        (("unsupported_target", f"{SPARSE_JSON}:modules:lm_head"),),
    ),
    BadAdapter(
        "more entries than the layer",
        "sparse",
        edit_config(SPARSE_JSON, modules={Q0: 257, "model.layers.1.self_attn.q_proj": 5}),
        (("shape_mismatch", f"{SPARSE_JSON}:modules:{Q0}"),),
    ),
    BadAdapter(
        "a module left out of the list",
        "sparse",
        edit_config(SPARSE_JSON, modules={"model.layers.1.self_attn.q_proj": 5}),
        tuple(("unexpected_tensor", f"{Q0}.{part}") for part in ("rows", "cols", "values")),
    ),
    tensor_case("columns missing", "missing_tensor", {f"{Q0}.cols": None}, f"{Q0}.cols", kind="sparse", file=SPARSE),
    tensor_case(
        "rows cut",
        "shape_mismatch",
        {f"{Q0}.rows": torch.ones(4, dtype=torch.int32)},
        f"{Q0}.rows",
        kind="sparse",
        file=SPARSE,
    ),
    tensor_case(
        "64-bit columns", "unsupported_dtype", {f"{Q0}.cols": torch.arange(5)}, f"{Q0}.cols", kind="sparse", file=SPARSE
    ),
    tensor_case(
        "integer values",
        "unsupported_dtype",
        {f"{Q0}.values": torch.ones(5, dtype=torch.int32)},
        f"{Q0}.values",
        kind="sparse",
        file=SPARSE,
    ),
    tensor_case(
        "infinite sparse value",
        "non_finite",
        {f"{Q0}.values": set_value(float("inf"))},
        f"{Q0}.values",
        kind="sparse",
        file=SPARSE,
    ),
    _sparse("row 16 of 16", "index_out_of_range", Q0, rows=[0, 0, 1, 2, 16]),
    _sparse("column -1", "index_out_of_range", Q0, cols=[-1, 1, 2, 3, 4]),
    _sparse("sparse position twice", "duplicate_index", Q0, cols=[0, 0, 2, 3, 4]),
    _sparse("rows out of order", "unsorted_index", Q0, rows=[3, 0, 1, 2, 3]),
)
