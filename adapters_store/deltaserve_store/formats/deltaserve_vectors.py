"""The project's own format of vectors: ``adapter.json`` and ``adapter.safetensors``. See ``docs/adapter-format.md``.

Per linear ``<module>.bias`` and ``.out_scale`` [out], ``.in_scale`` and ``.in_bias`` [in]: ``y = out_scale * W
(in_scale * x) + W in_bias + b + bias``; per norm ``<norm>.gain`` and ``.shift`` [H], added to the norm's weight and
bias. BitFit (Zaken et al., arXiv:2106.10199) is ``bias`` and ``shift`` alone, LoFiT (Yin et al., arXiv:2406.01563)
``in_bias`` of attention's output projections; gates of rows and columns are scales of both sides. The JSON carries the
base's fingerprint and, per module, what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Unpack

import torch

from deltaserve_store.file_names import SPARSE_CONFIG
from deltaserve_store.findings import Findings
from deltaserve_store.formats.module_match import is_head
from deltaserve_store.formats.own_config import (
    Told,
    check_listed,
    fields_of,
    is_one_of,
    modules_of,
    parsed_file,
    write_files,
)
from deltaserve_store.formats.tensor_checks import check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

FORMAT: Final = "deltaserve-vectors"
LINEAR_PARTS = ("bias", "out_scale", "in_scale", "in_bias")
NORM_PARTS = ("gain", "shift")
FIELDS: Mapping[str, str] = fields_of(
    FORMAT,
    f"object: path of a linear to some of {', '.join(LINEAR_PARTS)}, of a norm to some of {', '.join(NORM_PARTS)}",
)


def write_vector_adapter(
    folder: Path, deltas: Iterable[VectorDelta | NormDelta], base_fingerprint: str, **told: Unpack[Told]
) -> None:
    """Writes both files into ``folder`` (made if missing).

    Raises ``ValueError`` for two deltas of one module, for one that this format has no words for (``new_bias``,
    ``scales_bias``, ``replaces``), or when there is nothing to write.
    """
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, list[str]] = {}
    for delta in deltas:
        parts = LINEAR_PARTS if isinstance(delta, VectorDelta) else NORM_PARTS
        if isinstance(delta, VectorDelta):
            is_foreign = delta.new_bias is not None or delta.bias_scale is not None or delta.scales_bias
        else:
            is_foreign = delta.replaces
        if is_foreign or delta.module in modules:
            raise ValueError(f"{delta.module}: given twice, or not a change that this format can say")
        given = {part: vector for part in parts if (vector := getattr(delta, part)) is not None}
        tensors |= {f"{delta.module}.{part}": vector.contiguous() for part, vector in given.items()}
        if given:
            modules[delta.module] = list(given)
    write_files(folder, FORMAT, tensors, modules, base_fingerprint, **told)


def parse_deltaserve_vectors(
    config: Mapping[str, Any], tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    modules = modules_of(config, FIELDS, FORMAT, base, findings)
    shapes: dict[str, tuple[int, ...]] = {}
    for module, parts in modules.items():
        shapes |= vector_shapes(module, parts, base, findings)
    check_listed(shapes, tensors, findings, why="by the base", allowed=f"vectors listed in {SPARSE_CONFIG}")
    if findings:
        return None
    found = {name: tensors.read(name) for name in shapes}
    for name, values in found.items():
        check_values(name, values, findings)
    if findings:
        return None
    deltas: list[VectorDelta | NormDelta] = []
    for module in [name for name in (*base.linears, *base.norms) if name in modules]:
        given: dict[str, Any] = {part: found[f"{module}.{part}"] for part in modules[module]}
        deltas.append(VectorDelta(module, **given) if module in base.linears else NormDelta(module, **given))
    return parsed_file(config, ("vector",), deltas, num_parameters=sum(size for (size,) in shapes.values()))


def vector_shapes(
    module: str, parts: Any, base: BaseSpec, findings: Findings, *, allowed: str = FIELDS["modules"]
) -> dict[str, tuple[int, ...]]:
    """The vectors of one module by tensor name; empty, with a finding, when it cannot have them."""
    where = f"{SPARSE_CONFIG}:modules:{module}"
    linear, norm = base.linears.get(module), base.norms.get(module)
    if is_head(module):
        findings.add("unsupported_target", where, module, "linears and norms of the decoder")
    elif linear is None and norm is None:
        findings.add("unknown_module", where, module, "names of linears and norms of the base")
    elif not is_one_of(parts, LINEAR_PARTS if linear is not None else NORM_PARTS):
        findings.add("invalid_value", where, parts, allowed)
    elif linear is not None:
        return {f"{module}.{p}": (linear.in_features if p.startswith("in_") else linear.out_features,) for p in parts}
    elif norm is not None and "shift" in parts and not norm.has_bias:
        findings.add("unsupported_feature", where, "a shift of a norm that has no bias", "a gain")
    elif norm is not None:
        return {f"{module}.{part}": (norm.size,) for part in parts}
    return {}
