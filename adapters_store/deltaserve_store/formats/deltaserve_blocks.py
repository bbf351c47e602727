"""The project's own format of row and column blocks: ``adapter.json`` and ``adapter.safetensors``. See
``docs/adapter-format.md``.

S2FT (Yang et al., arXiv:2412.06289) trains some heads or channels whole: rows of the linears that produce them,
columns of the linear that reads them. Per linear ``<module>.rows [o]`` and ``<module>.cols [c]``, the places of what is
trained, one of them or both, and ``<module>.block [o, c]``, the dense difference there. The JSON carries the base's
fingerprint and, per module, which lists it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Unpack

import torch
from torch import Tensor

from deltaserve_store.block_deltas import BlockDelta
from deltaserve_store.file_names import SPARSE_CONFIG
from deltaserve_store.findings import Findings
from deltaserve_store.formats.module_match import is_head
from deltaserve_store.formats.own_config import Told, fields_of, is_one_of, modules_of, parsed_file, write_files
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, check_dtype, check_shape, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec, LinearSpec

FORMAT: Final = "deltaserve-blocks"
LISTS = ("rows", "cols")
FIELDS: Mapping[str, str] = fields_of(FORMAT, "object: path of a linear to the lists it has, some of rows, cols")


def write_block_adapter(
    folder: Path, deltas: Iterable[BlockDelta], base_fingerprint: str, **told: Unpack[Told]
) -> None:
    """Writes both files into ``folder`` (made if missing).

    Raises ``ValueError`` for two deltas of one module, for one without lists, or when there is nothing to write.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, list[str]] = {}
    for delta in deltas:
        lists = {"rows": delta.out_rows, "cols": delta.in_cols}
        given = {name: indices for name, indices in lists.items() if indices is not None}
        if not given or delta.module in modules:
            raise ValueError(f"{delta.module}: given twice, or a block without lists")
        tensors |= {f"{delta.module}.{name}": indices.contiguous() for name, indices in given.items()}
        tensors[f"{delta.module}.block"] = delta.values.contiguous()
        modules[delta.module] = list(given)
    write_files(folder, FORMAT, tensors, modules, base_fingerprint, **told)


def parse_deltaserve_blocks(
    config: Mapping[str, Any], tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    modules = modules_of(config, FIELDS, FORMAT, base, findings)
    known = {name: parts for name, parts in modules.items() if _is_known(name, parts, base, findings)}
    expected: set[str] = set()
    for module, lists in known.items():
        expected |= _check_layout(base.linears[module], lists, tensors, findings)
    for name in tensors.header.tensors:
        if name not in expected and name.rpartition(".")[0] not in modules:
            findings.add("unexpected_tensor", name, "a tensor of no listed module", f"modules of {SPARSE_CONFIG}")
        elif name not in expected and name.rpartition(".")[0] in known:
            findings.add("unexpected_tensor", name, "a tensor that its module has not", f"lists of {SPARSE_CONFIG}")
    if findings:
        return None
    deltas = [_read(base.linears[name], tensors, findings) for name in base.linears if name in known]
    if findings:
        return None
    return parsed_file(config, ("block",), deltas, num_parameters=sum(delta.values.numel() for delta in deltas))


def _is_known(module: str, lists: Any, base: BaseSpec, findings: Findings) -> bool:
    where = f"{SPARSE_CONFIG}:modules:{module}"
    if is_head(module) or module in base.vocabulary:
        findings.add("unsupported_target", where, module, "linears of the decoder layers")
    elif module not in base.linears:
        findings.add("unknown_module", where, module, "names of linears of the base")
    elif not is_one_of(lists, LISTS):
        findings.add("invalid_value", where, lists, FIELDS["modules"])
    else:
        return True
    return False


def _check_layout(linear: LinearSpec, lists: Sequence[str], tensors: TensorFile, findings: Findings) -> set[str]:
    """Names of the module's tensors; their dtypes and shapes fit one another and the base."""
    sizes = {"rows": linear.out_features, "cols": linear.in_features}
    expected = [f"{linear.name}.{part}" for part in (*lists, "block")]
    header = tensors.header.tensors
    for name in expected:
        if name not in header:
            findings.add("missing_tensor", name, "nothing", f"a tensor, by {SPARSE_CONFIG}")
    for part in lists:
        info = header.get(f"{linear.name}.{part}")
        if info is None:
            continue
        check_dtype(info, ("I32",), findings)
        if len(info.shape) == 1 and 1 <= info.shape[0] <= sizes[part]:
            sizes[part] = info.shape[0]
        else:
            findings.add("shape_mismatch", info.name, list(info.shape), f"[1 to {sizes[part]}]")
    block = header.get(f"{linear.name}.block")
    if block is not None:
        check_dtype(block, FLOAT_DTYPES, findings)
        check_shape(block, (sizes["rows"], sizes["cols"]), "by the lists, or all of the base's", findings)
    return set(expected)


def _read(linear: LinearSpec, tensors: TensorFile, findings: Findings) -> BlockDelta:
    lists: dict[str, Tensor | None] = {}
    for part, limit in (("rows", linear.out_features), ("cols", linear.in_features)):
        name = f"{linear.name}.{part}"
        lists[part] = tensors.read(name) if name in tensors.header.tensors else None
        if (listed := lists[part]) is not None:
            _check_list(name, listed, limit, findings)
    values = tensors.read(f"{linear.name}.block")
    check_values(f"{linear.name}.block", values, findings)
    return BlockDelta(linear.name, lists["rows"], lists["cols"], values)


def _check_list(name: str, listed: Tensor, limit: int, findings: Findings) -> None:
    low, high = (int(value) for value in torch.aminmax(listed))
    if low < 0 or high >= limit:
        findings.add("index_out_of_range", name, f"{low}..{high}", f"0..{limit - 1}")
    steps = listed.long().diff()
    if bool((steps < 0).any()):
        findings.add("unsorted_index", name, "places out of order", "strictly ascending places")
    if len(torch.unique(listed)) != len(listed):
        findings.add("duplicate_index", name, "a place twice", "each place once")
