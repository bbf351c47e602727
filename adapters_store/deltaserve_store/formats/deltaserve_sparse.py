"""The project's own sparse format: ``adapter.json`` and ``adapter.safetensors``. See ``docs/adapter-format.md``.

Per linear ``<module>.rows`` and ``<module>.cols`` (int32 ``[k]``) and ``<module>.values`` (``[k]``), sorted by row and
then column, each position once, in ``[out, in]`` orientation: ``W[rows[i], cols[i]] += values[i]``. The JSON carries
the base's fingerprint, so these files cannot be served on another base, with or without a waiver.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

import torch

from deltaserve_store.file_names import SPARSE_CONFIG
from deltaserve_store.findings import Findings
from deltaserve_store.formats.module_match import is_head
from deltaserve_store.formats.own_config import Told, fields_of, modules_of, parsed_file, write_files
from deltaserve_store.formats.sparse_entries import check_positions, keys_of, sort_entries
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, check_dtype, check_shape, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import ParsedAdapter, SparseDelta
from deltaserve_store.spec import BaseSpec, LinearSpec

FORMAT = "deltaserve-sparse"
PARTS = ("rows", "cols", "values")
FIELDS: Mapping[str, str] = fields_of(FORMAT, "object: module path to its number of entries (at least 1)")


def write_sparse_adapter(
    folder: Path, deltas: Iterable[SparseDelta], base_fingerprint: str, **told: Unpack[Told]
) -> None:
    """Writes both files into ``folder`` (made if missing). Deltas without entries are left out.

    Entries may come in any order; they are sorted. Raises ``ValueError`` for a position that occurs twice, tensors of
    unequal length, or when nothing is left to write.
    """
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, int] = {}
    for delta in sorted(deltas, key=lambda delta: delta.module):
        if not delta.rows.shape == delta.cols.shape == delta.values.shape or delta.rows.ndim != 1:
            raise ValueError(f"rows, cols and values of {delta.module} must be of one length")
        if not delta.num_entries:
            continue
        if delta.module in modules:
            raise ValueError(f"two deltas for {delta.module}")
        width = int(delta.cols.max()) + 1
        rows, cols, values, num_duplicates = sort_entries(delta.rows, delta.cols, delta.values, width)
        if num_duplicates:
            raise ValueError(f"{num_duplicates} positions of {delta.module} occur twice")
        tensors |= {f"{delta.module}.{part}": item for part, item in zip(PARTS, (rows, cols, values), strict=True)}
        modules[delta.module] = delta.num_entries
    write_files(folder, FORMAT, tensors, modules, base_fingerprint, **told)


def parse_deltaserve_sparse(
    config: Mapping[str, Any], tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    modules = _check_config(config, base, findings)
    _check_layout(modules, tensors, base, findings)
    if findings:
        return None
    deltas = tuple(
        delta
        for module in base.linears
        if module in modules and (delta := read_entries(base.linears[module], tensors, findings)) is not None
    )
    if findings:
        return None
    return parsed_file(config, ("sparse",), deltas, num_parameters=sum(delta.num_entries for delta in deltas))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_config(config: Mapping[str, Any], base: BaseSpec, findings: Findings) -> dict[str, int]:
    """The ``modules`` object; empty when it cannot be used."""
    modules = modules_of(config, FIELDS, FORMAT, base, findings)
    if all(_is_count(count) for count in modules.values()):
        return modules
    findings.add("invalid_value", f"{SPARSE_CONFIG}:modules", modules, FIELDS["modules"])
    return {}


def _check_layout(modules: Mapping[str, int], tensors: TensorFile, base: BaseSpec, findings: Findings) -> None:
    expected: set[str] = set()
    for module, count in modules.items():
        where = f"{SPARSE_CONFIG}:modules:{module}"
        expected.update(f"{module}.{part}" for part in PARTS)
        linear = base.linears.get(module)
        if is_head(module):
            findings.add("unsupported_target", where, module, "linears of the decoder layers")
            continue
        if linear is None:
            findings.add("unknown_module", where, module, "names of linears of the base")
            continue
        if count > linear.out_features * linear.in_features:
            size = f"{linear.out_features} x {linear.in_features}"
            findings.add("shape_mismatch", where, f"{count} entries", f"at most {size}")
            continue
        for part in PARTS:
            info = tensors.header.tensors.get(f"{module}.{part}")
            if info is None:
                findings.add("missing_tensor", f"{module}.{part}", "nothing", f"[{count}] by {SPARSE_CONFIG}")
                continue
            check_dtype(info, FLOAT_DTYPES if part == "values" else ("I32",), findings)
            check_shape(info, (count,), f"by {SPARSE_CONFIG}", findings)
    for name in tensors.header.tensors:
        if name not in expected:
            findings.add("unexpected_tensor", name, "a tensor of no listed module", "rows, cols, values of modules")


def read_entries(linear: LinearSpec, tensors: TensorFile, findings: Findings) -> SparseDelta | None:
    """Rows, cols and values of one linear, laid out as the header says; None when ``findings`` got a reason."""
    rows, cols, values = (tensors.read(f"{linear.name}.{part}") for part in PARTS)
    check_values(f"{linear.name}.values", values, findings)
    if not check_positions(linear.name, rows, cols, linear, findings):
        return None
    keys = keys_of(rows, cols, linear.in_features)
    steps = keys[1:] - keys[:-1]
    if bool((steps == 0).any()):
        findings.add("duplicate_index", linear.name, "a position twice in a row", "each position once")
        return None
    if bool((steps < 0).any()):
        findings.add("unsorted_index", linear.name, "positions out of order", "sorted by row, then column")
        return None
    return SparseDelta(linear.name, rows, cols, values)
