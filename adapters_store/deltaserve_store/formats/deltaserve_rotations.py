"""The project's own format of rotations: ``adapter.json`` and ``adapter.safetensors``. See ``docs/adapter-format.md``.

Per linear some factors, which its input or output meets one after the other: ``<module>.changes.<i>`` [n / b, b, b] (or
[1, b, b]: one for all blocks) and, where the factor has one, ``<module>.order.<i>`` int32 [n]. A row vector is taken in
that order and cut into blocks, block z becomes ``z + z @ changes[k]``, and all go back to their places. Products of
Givens rotations (qGOFT, Ma et al., arXiv:2404.04316) are factors of blocks of 2; some of them multiplied out are one
factor of larger blocks. Nothing has to be orthogonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Unpack

import torch
from torch import Tensor

from deltaserve_store.file_names import SPARSE_CONFIG
from deltaserve_store.findings import Findings
from deltaserve_store.formats.module_match import is_head
from deltaserve_store.formats.own_config import Told, fields_of, modules_of, parsed_file, write_files
from deltaserve_store.formats.peft_kinds.cayley import MAX_BLOCK, turn_columns
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, check_dtype, check_shape, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.rotation_deltas import RotationBlocks, RotationDelta
from deltaserve_store.spec import BaseSpec

FORMAT: Final = "deltaserve-rotations"
SIDES = ("input", "output")
MAX_FACTORS = 16
_PARTS = {"side", "factors", "orders"}
FIELDS: Mapping[str, str] = fields_of(
    FORMAT,
    'object: path of a linear to {"side": "input" or "output", "factors": how many, 1 to '
    f'{MAX_FACTORS}, "orders": list of those that have an order}}',
)


def write_rotation_adapter(
    folder: Path, deltas: Iterable[RotationDelta], base_fingerprint: str, **told: Unpack[Told]
) -> None:
    """Writes both files into ``folder`` (made if missing); of each delta its ``factors`` count, not its ``turn``.

    Raises ``ValueError`` for two deltas of one module, for one with a scale, or when there is nothing to write.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    for delta in deltas:
        if delta.module in modules or delta.out_scale is not None or not delta.factors:
            raise ValueError(f"{delta.module}: given twice, or not a change that this format can say")
        for at, (changes, order) in enumerate(delta.factors):
            tensors[f"{delta.module}.changes.{at}"] = changes.contiguous()
            if order is not None:
                tensors[f"{delta.module}.order.{at}"] = order.int().contiguous()
        orders = [at for at, factor in enumerate(delta.factors) if factor.order is not None]
        modules[delta.module] = {"side": delta.side, "factors": len(delta.factors), "orders": orders}
    write_files(folder, FORMAT, tensors, modules, base_fingerprint, **told)


def parse_deltaserve_rotations(
    config: Mapping[str, Any], tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    modules = modules_of(config, FIELDS, FORMAT, base, findings)
    names = {
        name for module, parts in modules.items() for name in _check_module(module, parts, tensors, base, findings)
    }
    for name in tensors.header.tensors:
        if name not in names and (modules or not findings):
            allowed = f"tensors of factors listed in {SPARSE_CONFIG}"
            findings.add("unexpected_tensor", name, "a tensor of no listed factor", allowed)
    if findings:
        return None
    deltas = [_read(name, modules[name], tensors, findings) for name in base.linears if name in modules]
    if findings:
        return None
    return parsed_file(
        config,
        ("rotation",),
        deltas,
        num_parameters=sum(changes.numel() for delta in deltas for changes, _ in delta.factors),
    )


def _check_module(module: str, parts: Any, tensors: TensorFile, base: BaseSpec, findings: Findings) -> list[str]:
    """The names of the module's tensors, which are there in shapes that fit; empty when it cannot have them."""
    where = f"{SPARSE_CONFIG}:modules:{module}"
    linear = base.linears.get(module)
    if is_head(module):
        findings.add("unsupported_target", where, module, "linears of the decoder")
    elif linear is None:
        findings.add("unknown_module", where, module, "names of linears of the base")
    elif not _is_rotation(parts):
        findings.add("invalid_value", where, parts, FIELDS["modules"])
    else:
        width = linear.in_features if parts["side"] == "input" else linear.out_features
        names = []
        for at in range(parts["factors"]):
            name = f"{module}.changes.{at}"
            names.append(name)
            info = tensors.header.tensors.get(name)
            if info is None:
                findings.add("missing_tensor", name, "nothing", f"by {SPARSE_CONFIG}")
            elif check_dtype(info, FLOAT_DTYPES, findings):
                size = info.shape[-1]
                count = info.shape[0] if len(info.shape) == 3 and info.shape[1] == size else 0
                if not 1 <= size <= MAX_BLOCK or width % size or count not in (1, width // size):
                    allowed = f"blocks [{width} / b, b, b] or [1, b, b], b up to {MAX_BLOCK}"
                    findings.add("shape_mismatch", name, list(info.shape), allowed)
        for at in parts["orders"]:
            name = f"{module}.order.{at}"
            names.append(name)
            info = tensors.header.tensors.get(name)
            if info is None:
                findings.add("missing_tensor", name, "nothing", f"[{width}] by {SPARSE_CONFIG}")
            elif check_dtype(info, ("I32",), findings):
                check_shape(info, (width,), "by the base", findings)
        return names
    return []


def _is_rotation(parts: Any) -> bool:
    if not isinstance(parts, dict) or set(parts) != _PARTS or parts["side"] not in SIDES:
        return False
    count, orders = parts["factors"], parts["orders"]
    return (
        type(count) is int
        and 1 <= count <= MAX_FACTORS
        and isinstance(orders, list)
        and all(type(at) is int and 0 <= at < count for at in orders)
        and len(set(orders)) == len(orders)
    )


def _read(module: str, parts: Mapping[str, Any], tensors: TensorFile, findings: Findings) -> RotationDelta:
    factors = []
    for at in range(parts["factors"]):
        changes = tensors.read(f"{module}.changes.{at}")
        check_values(f"{module}.changes.{at}", changes, findings)
        order = tensors.read(f"{module}.order.{at}") if at in parts["orders"] else None
        if order is not None:
            _check_order(f"{module}.order.{at}", order, findings)
        factors.append(RotationBlocks(changes.float(), order))
    turn = _turn_inputs if parts["side"] == "input" else _turn_outputs
    kept = tuple(factors)
    return RotationDelta(module, parts["side"], kept, lambda weight: turn(weight, kept))


def _check_order(name: str, order: Tensor, findings: Findings) -> None:
    size = len(order)
    if int(order.min()) < 0 or int(order.max()) >= size:
        found = f"{int(order.min())}..{int(order.max())}"
        findings.add("index_out_of_range", name, found, f"0..{size - 1}")
    elif len(order.unique()) != size:
        findings.add("duplicate_index", name, "a place twice", f"each of 0..{size - 1} once")


Factors = tuple[RotationBlocks, ...]


def _turn_inputs(weight: Tensor, factors: Factors) -> Tensor:
    """``W F_m-1' ... F_0'``, the last factor first, float32: x meets F_0 first."""
    turned = weight.double()
    for changes, order in reversed(factors):
        turned = _times(turned, _whole(changes), order)
    return turned.float()


def _turn_outputs(weight: Tensor, factors: Factors) -> Tensor:
    """``F_m-1' ... F_0' W``, of any number of columns."""
    turned = weight.double().t()
    for changes, order in factors:
        turned = _times(turned, _whole(changes).transpose(1, 2), order)
    return turned.t().float()


def _whole(changes: Tensor) -> Tensor:
    """The factor's blocks themselves, float64."""
    return changes.double() + torch.eye(changes.shape[-1], dtype=torch.float64)


def _times(rows: Tensor, blocks: Tensor, order: Tensor | None) -> Tensor:
    """Rows [R, n] times the transpose of the factor of these blocks."""
    if order is None:
        return turn_columns(rows, blocks)
    turned = torch.empty_like(rows)
    turned[:, order.long()] = turn_columns(rows[:, order.long()], blocks)
    return turned
