"""PEFT SHiRA: ``base_model.model.<module>.shira_indices`` int32 ``[2, n]`` (row, column) and ``...shira_weight [n]``.

The delta is the sparse matrix of those entries in ``[out, in]`` at scale 1, with ``n = r * (in + out)``. On Windows
PEFT writes the indices as float32. Source: peft 0.21, ``tuners/shira/{layer,model}.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.beside import Beside
from deltaserve_store.formats.peft_config import PeftShiraConfig, parse_shira_config
from deltaserve_store.formats.sparse_entries import check_positions, sort_entries
from deltaserve_store.formats.tensor_checks import (
    FLOAT_DTYPES,
    PEFT_PREFIX,
    check_dtype,
    check_shape,
    check_values,
    name_stray_tensor,
)
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import ParsedAdapter, SparseDelta
from deltaserve_store.spec import BaseSpec, LinearSpec


def parse_peft_shira(
    config: Mapping[str, Any], config_name: str, tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    shira = parse_shira_config(config, base, config_name, findings)
    if shira is None:
        return None
    beside = Beside(config, shira.targets.select(base), tensors, base, config_name, findings)
    modules = beside.targets
    beside.check_layout(tensors, findings)
    _check_layout(shira, modules, tensors, base, findings, others=beside.names)
    if findings:
        return None
    others = beside.read(tensors, findings)
    deltas = tuple(
        delta for module in modules if (delta := _read_delta(base.linears[module], tensors, findings)) is not None
    )
    if findings:
        return None
    return ParsedAdapter(
        kind="sparse",
        file_format="peft-shira",
        deltas=(*deltas, *others),
        config=config,
        base_name=shira.base_name,
        base_fingerprint=None,
        rank=None,
        num_parameters=beside.num_parameters + sum(delta.num_entries for delta in deltas),
    )


def _names(module: str) -> tuple[str, str]:
    return f"{PEFT_PREFIX}{module}.shira_indices", f"{PEFT_PREFIX}{module}.shira_weight"


def _check_layout(
    shira: PeftShiraConfig,
    modules: tuple[str, ...],
    tensors: TensorFile,
    base: BaseSpec,
    findings: Findings,
    *,
    others: Iterable[str],
) -> None:
    expected: set[str] = set(others)
    for module in modules:
        linear = base.linears[module]
        count = shira.rank * (linear.in_features + linear.out_features)
        shapes_and_dtypes: tuple[tuple[tuple[int, ...], tuple[str, ...]], ...] = (
            ((2, count), ("I32", "I64", "F32")),
            ((count,), FLOAT_DTYPES),
        )
        for name, (shape, dtypes) in zip(_names(module), shapes_and_dtypes, strict=True):
            expected.add(name)
            info = tensors.header.tensors.get(name)
            if info is None:
                findings.add("missing_tensor", name, "nothing", f"{list(shape)} (targeted, r {shira.rank})")
                continue
            check_dtype(info, dtypes, findings)
            check_shape(info, shape, f"r {shira.rank} times (in + out)", findings)
    for name in tensors.header.tensors:
        if name not in expected:
            name_stray_tensor(name, base, findings)


def _read_delta(linear: LinearSpec, tensors: TensorFile, findings: Findings) -> SparseDelta | None:
    name_indices, name_values = _names(linear.name)
    values = tensors.read(name_values)
    check_values(name_values, values, findings)
    indices = _as_integers(name_indices, tensors.read(name_indices), findings)
    if indices is None or not check_positions(name_indices, indices[0], indices[1], linear, findings):
        return None
    rows, cols, values, num_duplicates = sort_entries(indices[0], indices[1], values, linear.in_features)
    if num_duplicates:
        findings.add("duplicate_index", name_indices, f"{num_duplicates} positions twice", "each position once")
        return None
    return SparseDelta(linear.name, rows, cols, values)


def _as_integers(name: str, indices: Tensor, findings: Findings) -> Tensor | None:
    if indices.dtype != torch.float32:
        return indices
    if not bool(torch.isfinite(indices).all()) or not bool((indices == indices.round()).all()):
        findings.add("index_out_of_range", name, "fractions, NaN or infinity", "whole numbers")
        return None
    return indices.to(torch.int64)
