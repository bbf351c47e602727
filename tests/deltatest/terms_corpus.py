"""Damaged adapters of the project's own format of sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from deltaserve_store.formats.deltaserve_terms import write_terms_adapter
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_store.vector_deltas import NormDelta, VectorDelta
from deltatest.adapter_corpus import FINGERPRINT, Q0, BadAdapter, edit_config, edit_tensors, set_value

JSON, TERMS = "adapter.json", "adapter.safetensors"
V1 = "model.layers.1.self_attn.v_proj"
NORM0 = "model.layers.0.input_layernorm"
MODULES = {
    Q0: {"rank": 3, "entries": 4, "vectors": ["bias", "out_scale"]},
    V1: {"rank": 2},
    NORM0: {"vectors": ["gain"]},
}


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def write_good_terms(folder: Path) -> Path:
    """Low rank, entries and vectors on one linear; low rank alone; a gain."""
    at = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    deltas = (
        LoraDelta(Q0, _drawn(3, 16), _drawn(16, 3), 2.0),
        SparseDelta(Q0, at, torch.tensor([5, 1, 2, 0], dtype=torch.int32), _drawn(4)),
        VectorDelta(Q0, bias=_drawn(16), out_scale=1 + 0.1 * _drawn(16)),
        LoraDelta(V1, _drawn(2, 16), _drawn(8, 2), 1.0),
        NormDelta(NORM0, gain=_drawn(16)),
    )
    write_terms_adapter(folder, deltas, FINGERPRINT, base_name="tests/corpus-base", method="by hand")
    return folder


def _case(name: str, spoil: Any, *reasons: tuple[str, str], is_exact: bool = True) -> BadAdapter:
    return BadAdapter(name, "terms", spoil, reasons, is_exact, write_good_terms)


def _tensor(name: str, code: str, where: str, value: Any) -> BadAdapter:
    """One tensor replaced (None: taken away)."""
    return _case(name, edit_tensors({where: value}, TERMS), (code, where))


def _field(field: str, value: Any, code: str, *, is_exact: bool = True) -> BadAdapter:
    name = f"config {field}={json.dumps(None if value is ... else value)[:40]}"
    return _case(name, edit_config(JSON, **{field: value}), (code, f"{JSON}:{field}"), is_exact=is_exact)


def _module(name: str, code: str, module: str, told: Any, where: str = "") -> BadAdapter:
    spoil = edit_config(JSON, modules={**MODULES, module: told})
    return _case(name, spoil, (code, f"{JSON}:modules:{module}{where}"), is_exact=False)


NAN, INF = float("nan"), float("inf")
TERMS_CORPUS: tuple[BadAdapter, ...] = (
    _field("base_fingerprint", "cd" * 32, "base_mismatch"),
    _field("format", "somebody-else", "unsupported_kind", is_exact=False),
    _field("format_version", 2, "invalid_value"),
    _field("scaling", 2.0, "unknown_field"),
    _field("modules", {}, "target_not_found", is_exact=False),
    _field("modules", [Q0], "invalid_value", is_exact=False),
    _field("modules", ..., "missing_field", is_exact=False),
    _module("a linear the base does not have", "unknown_module", "model.layers.9.self_attn.q_proj", {"rank": 2}),
    _module("the head", "unsupported_target", "lm_head", {"rank": 2}),
    _module("rank 0", "rank_out_of_range", Q0, {"rank": 0}, ":rank"),
    _module("rank 1025", "rank_out_of_range", Q0, {"rank": 1025}, ":rank"),
    _module("rank true", "rank_out_of_range", Q0, {"rank": True}, ":rank"),
    _module("no entries", "invalid_value", Q0, {"entries": 0}, ":entries"),
    _module("more entries than the layer has", "invalid_value", Q0, {"entries": 16 * 16 + 1}, ":entries"),
    _module("a module with nothing", "invalid_value", Q0, {}),
    _module("a module that is a number", "invalid_value", Q0, 3),
    _module("an unknown part", "invalid_value", Q0, {"rank": 3, "alpha": 4}),
    _module("the rank of a norm", "invalid_value", NORM0, {"rank": 2}),
    _module("a gain of a linear", "invalid_value", Q0, {"vectors": ["gain"]}),
    _module("scales on both sides", "unsupported_feature", Q0, {"vectors": ["out_scale", "in_scale"]}),
    _module("a shift of a norm without a bias", "unsupported_feature", NORM0, {"vectors": ["shift"]}),
    _tensor("a factor missing", "missing_tensor", f"{Q0}.a", None),
    _tensor("the other factor missing", "missing_tensor", f"{Q0}.b", None),
    _tensor("values missing", "missing_tensor", f"{Q0}.values", None),
    _tensor("the bias missing", "missing_tensor", f"{Q0}.bias", None),
    _tensor("another rank", "shape_mismatch", f"{Q0}.a", torch.ones(4, 16)),
    _tensor("b laid out the other way", "shape_mismatch", f"{V1}.b", torch.ones(2, 8)),
    _tensor("one entry too many", "shape_mismatch", f"{Q0}.rows", torch.zeros(5, dtype=torch.int32)),
    _tensor("64-bit rows", "unsupported_dtype", f"{Q0}.rows", torch.tensor([0, 3, 3, 9])),
    _tensor("an integer factor", "unsupported_dtype", f"{Q0}.a", torch.ones(3, 16, dtype=torch.int32)),
    _tensor("NaN in a factor", "non_finite", f"{Q0}.b", set_value(NAN)),
    _tensor("infinity in the values", "non_finite", f"{Q0}.values", set_value(INF)),
    _tensor("a huge gain", "value_out_of_range", f"{NORM0}.gain", set_value(1e20)),
    _tensor("a tensor of no term", "unexpected_tensor", f"{V1}.bias", torch.ones(8)),
    _case(
        "a row outside the layer",
        edit_tensors({f"{Q0}.rows": torch.tensor([0, 3, 3, 16], dtype=torch.int32)}, TERMS),
        ("index_out_of_range", Q0),
    ),
    _case(
        "a position twice",
        edit_tensors({f"{Q0}.cols": torch.tensor([5, 1, 1, 0], dtype=torch.int32)}, TERMS),
        ("duplicate_index", Q0),
    ),
    _case(
        "positions out of order",
        edit_tensors({f"{Q0}.cols": torch.tensor([5, 2, 1, 0], dtype=torch.int32)}, TERMS),
        ("unsorted_index", Q0),
    ),
)
