"""The project's own format of residual modules: ``adapter.json`` and ``adapter.safetensors``. See
``docs/adapter-format.md``.

Per attach point ``<point>.down [r, H]`` and ``<point>.up [H, r]``, and the biases that its entry of ``modules`` lists,
``<point>.down_bias [r]`` and ``<point>.up_bias [H]``. Sequential modules are Houlsby's adapters (arXiv:1902.00751),
parallel ones those of He et al. (arXiv:2110.04366); neither has a file format that others read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Unpack

import torch

from deltaserve_store.bottleneck_deltas import ACTIVATIONS, BottleneckDelta
from deltaserve_store.file_names import SPARSE_CONFIG
from deltaserve_store.findings import Findings
from deltaserve_store.formats.own_config import (
    BY_FILE,
    Told,
    check_listed,
    fields_of,
    is_one_of,
    modules_of,
    parsed_file,
    write_files,
)
from deltaserve_store.formats.peft_fields import MAX_RANK
from deltaserve_store.formats.tensor_checks import check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec

FORMAT: Final = "deltaserve-bottleneck"
PLACEMENTS = ("sequential", "parallel")
BIASES = ("down_bias", "up_bias")
SUBLAYER_OUTPUTS = (".attn_out", ".mlp_out")
MAX_SCALE = 65536.0
FIELDS: Mapping[str, str] = fields_of(FORMAT, "object: attach point of the base to its module, as below")
MODULE_FIELDS: Mapping[str, str] = {
    "rank": f"an integer from 1 to {MAX_RANK}",
    "activation": f"one of {', '.join(ACTIVATIONS)}",
    "placement": "sequential, or at the output of a sublayer parallel",
    "scale": f"optional, 1: a number other than 0, at most {MAX_SCALE:g} in absolute value",
    "biases": f"optional, none: a list of some of {', '.join(BIASES)}",
}
REQUIRED_OF_MODULE = ("rank", "activation", "placement")


@dataclass(frozen=True, slots=True)
class _Module:
    """One entry of ``modules``, checked; ``shapes`` by tensor name."""

    rank: int
    activation: str
    is_parallel: bool
    scale: float
    shapes: dict[str, tuple[int, ...]]


def write_bottleneck_adapter(
    folder: Path, deltas: Iterable[BottleneckDelta], base_fingerprint: str, **told: Unpack[Told]
) -> None:
    """Writes both files into ``folder`` (made if missing). Raises ``ValueError`` for two modules at one point, for an
    unknown activation, or when there is nothing to write."""
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    for delta in deltas:
        if delta.point in modules or delta.activation not in ACTIVATIONS:
            raise ValueError(f"{delta.point}: given twice, or its activation is unknown")
        given = {part: value for part in ("down", "up", *BIASES) if (value := getattr(delta, part)) is not None}
        tensors |= {f"{delta.point}.{part}": value.contiguous() for part, value in given.items()}
        modules[delta.point] = {
            "rank": delta.rank,
            "activation": delta.activation,
            "placement": PLACEMENTS[delta.is_parallel],
            "scale": delta.scale,
            "biases": [part for part in BIASES if part in given],
        }
    write_files(folder, FORMAT, tensors, modules, base_fingerprint, **told)


def parse_deltaserve_bottleneck(
    config: Mapping[str, Any], tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    given = modules_of(config, FIELDS, FORMAT, base, findings)
    modules = {point: _module(point, entry, base, findings) for point, entry in given.items()}
    shapes = {name: shape for module in modules.values() if module for name, shape in module.shapes.items()}
    check_listed(shapes, tensors, findings, why=BY_FILE, allowed=f"what {SPARSE_CONFIG} lists")
    if findings:
        return None
    found = {name: tensors.read(name) for name in shapes}
    for name, values in found.items():
        check_values(name, values, findings)
    if findings:
        return None
    deltas = tuple(
        BottleneckDelta(
            point,
            found[f"{point}.down"],
            found[f"{point}.up"],
            module.activation,
            found.get(f"{point}.down_bias"),
            found.get(f"{point}.up_bias"),
            module.is_parallel,
            module.scale,
        )
        for point, module in sorted(modules.items())
        if module is not None
    )
    return parsed_file(
        config,
        ("bottleneck",),
        deltas,
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        rank=max(delta.rank for delta in deltas),
    )


def _module(point: str, entry: Any, base: BaseSpec, findings: Findings) -> _Module | None:
    where = f"{SPARSE_CONFIG}:modules:{point}"
    if point not in base.points:
        findings.add("unknown_module", where, point, "attach points of the base: " + _told(base))
        return None
    if not isinstance(entry, dict):
        findings.add("invalid_value", where, entry, f"an object with {', '.join(REQUIRED_OF_MODULE)}")
        return None
    is_good = True
    for field in (*entry, *(name for name in REQUIRED_OF_MODULE if name not in entry)):
        code = _problem(field, entry, point)
        if code is not None:
            is_good = False
            found, allowed = entry.get(field, "nothing"), MODULE_FIELDS.get(field, f"{', '.join(MODULE_FIELDS)}")
            findings.add(code, f"{where}:{field}", found, allowed)
    if not is_good:
        return None
    rank, size = entry["rank"], base.hidden_size
    all_shapes = {"down": (rank, size), "up": (size, rank), "down_bias": (rank,), "up_bias": (size,)}
    shapes = {f"{point}.{part}": all_shapes[part] for part in ("down", "up", *(entry.get("biases") or ()))}
    return _Module(rank, entry["activation"], entry["placement"] == "parallel", float(entry.get("scale", 1.0)), shapes)


def _problem(field: str, entry: Mapping[str, Any], point: str) -> str | None:
    """The code of what is wrong with one field of a module, None when it is good."""
    value: Any = entry.get(field)
    if field not in MODULE_FIELDS:
        return "unknown_field"
    if field not in entry:
        return "missing_field"
    if field == "rank":
        is_count = type(value) is int
        return "invalid_value" if not is_count else None if 1 <= value <= MAX_RANK else "rank_out_of_range"
    if field == "activation":
        return None if isinstance(value, str) and value in ACTIVATIONS else "unsupported_feature"
    if field == "placement":
        if value == "parallel" and not point.endswith(SUBLAYER_OUTPUTS):
            return "unsupported_feature"
        return None if isinstance(value, str) and value in PLACEMENTS else "invalid_value"
    if field == "scale":
        is_number = type(value) in (int, float)
        return None if is_number and 0 < abs(value) <= MAX_SCALE else "invalid_value"
    return None if value == [] or is_one_of(value, BIASES) else "invalid_value"


def _told(base: BaseSpec) -> str:
    """A few attach points, for a reader."""
    first = [point for point in sorted(base.points) if "." not in point or point.split(".")[1] == "0"]
    return ", ".join(first) + (f"; layers 0 to {base.num_layers - 1}" if len(first) < len(base.points) else "")
