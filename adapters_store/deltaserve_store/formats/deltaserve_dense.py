"""The project's own format of whole-weight differences: ``adapter.json`` and ``adapter.safetensors``. See
``docs/adapter-format.md``.

Per linear one of ``<module>.delta [out, in]``; ``<module>.mask``, one bit a weight, set where it is taken out (mask
fine-tuning); ``<module>.signs``, one bit a weight, with ``<module>.scale`` (BitDelta, Liu et al., arXiv:2402.10193).
Beside it, or alone, ``<module>.bias``; per norm ``<norm>.gain`` and ``.shift``: what a partial fine-tune changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Unpack

import torch

from deltaserve_store.dense_deltas import WORD_BITS, DenseDelta, MaskDelta, SignDelta
from deltaserve_store.file_names import SPARSE_CONFIG
from deltaserve_store.findings import Findings
from deltaserve_store.formats.deltaserve_vectors import NORM_PARTS, vector_shapes
from deltaserve_store.formats.own_config import Told, fields_of, is_one_of, modules_of, parsed_file, write_files
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, check_dtype, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import Delta, ParsedAdapter
from deltaserve_store.spec import BaseSpec, LinearSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

FORMAT: Final = "deltaserve-dense"
FORMS = (("delta",), ("mask",), ("signs", "scale"))
PARTS = ("delta", "mask", "signs", "scale", "bias")
INTEGERS = ("mask", "signs")
MAX_DENSE_WEIGHTS = 1 << 29
"""Most weights that ``delta`` and ``mask`` of an adapter may cover, 1 GB in 16 bits; ``signs`` count 1/16."""
FIELDS: Mapping[str, str] = fields_of(
    FORMAT, "object: path of a linear to delta, mask, or signs and scale, and bias; of a norm to gain, shift"
)
Shapes = dict[str, tuple[tuple[int, ...], ...]]


def write_dense_adapter(
    folder: Path,
    deltas: Iterable[DenseDelta | MaskDelta | SignDelta | VectorDelta | NormDelta],
    base_fingerprint: str,
    **told: Unpack[Told],
) -> None:
    """Writes both files into ``folder`` (made if missing). Of vectors: biases that are added, and norm differences.

    Raises ``ValueError`` for a part given twice, for vectors that this format has no words for, or when there is
    nothing to write.
    """
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, list[str]] = {}
    for delta in deltas:
        if isinstance(delta, VectorDelta):
            others = (delta.out_scale, delta.in_scale, delta.in_bias, delta.new_bias, delta.bias_scale)
            is_foreign = any(v is not None for v in others)
        else:
            is_foreign = isinstance(delta, NormDelta) and delta.replaces
        for part in (*PARTS, *NORM_PARTS):
            value = getattr(delta, part, None)
            if value is None:
                continue
            if is_foreign or f"{delta.module}.{part}" in tensors:
                raise ValueError(f"{delta.module}: {part} is given twice, or not a change that this format can say")
            tensors[f"{delta.module}.{part}"] = value.contiguous()
            modules.setdefault(delta.module, []).append(part)
    write_files(folder, FORMAT, tensors, modules, base_fingerprint, **told)


def parse_deltaserve_dense(
    config: Mapping[str, Any], tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    modules = modules_of(config, FIELDS, FORMAT, base, findings)
    shapes: Shapes = {}
    for module, parts in modules.items():
        shapes |= _shapes(module, parts, base, findings)
    _check_size(modules, base, findings)
    _check_layout(shapes, tensors, findings)
    if findings:
        return None
    deltas: list[Delta] = []
    num_parameters = 0
    for module in [name for name in (*base.linears, *base.norms) if name in modules]:
        found = {part: tensors.read(f"{module}.{part}") for part in modules[module]}
        linear = base.linears.get(module)
        for part, values in found.items():
            if part not in INTEGERS:
                check_values(f"{module}.{part}", values, findings)
                num_parameters += values.numel()
            elif linear is not None:
                check_bits(f"{module}.{part}", values, linear, findings)
                num_parameters += linear.out_features * linear.in_features
        deltas += _deltas(module, found)
    if findings:
        return None
    return parsed_file(config, ("dense",), deltas, num_parameters=num_parameters)


def _deltas(module: str, found: Mapping[str, torch.Tensor]) -> list[Delta]:
    deltas: list[Delta] = []
    if "delta" in found:
        deltas.append(DenseDelta(module, found["delta"]))
    if "mask" in found:
        deltas.append(MaskDelta(module, found["mask"]))
    if "signs" in found:
        deltas.append(SignDelta(module, found["signs"], found["scale"]))
    if "bias" in found:
        deltas.append(VectorDelta(module, bias=found["bias"]))
    if "gain" in found or "shift" in found:
        deltas.append(NormDelta(module, found.get("gain"), found.get("shift")))
    return deltas


def _shapes(module: str, parts: Any, base: BaseSpec, findings: Findings) -> Shapes:
    """The tensors of one module by name, with the shapes they may have; empty when it cannot have them."""
    where = f"{SPARSE_CONFIG}:modules:{module}"
    linear = base.linears.get(module)
    if linear is None:
        found = vector_shapes(module, parts, base, findings, allowed=FIELDS["modules"])
        return {name: (shape,) for name, shape in found.items()}
    if not is_one_of(parts, PARTS) or _form_of(parts) is None:
        findings.add("invalid_value", where, parts, FIELDS["modules"])
        return {}
    size, words = (linear.out_features, linear.in_features), -(-linear.in_features // WORD_BITS)
    of_part: Shapes = {
        "delta": (size,),
        "mask": ((size[0], words),),
        "signs": ((size[0], words),),
        "scale": ((size[0],), (1,)),
        "bias": ((size[0],),),
    }
    return {f"{module}.{part}": of_part[part] for part in parts}


def _form_of(parts: Sequence[str]) -> tuple[str, ...] | None:
    """Which of the forms a linear's parts are, () for a bias alone; None when they are none or several."""
    given = {part for part in parts if part != "bias"}
    return next((form for form in ((), *FORMS) if given == set(form)), None)


def _check_size(modules: Mapping[str, Any], base: BaseSpec, findings: Findings) -> None:
    total = 0
    for module, parts in modules.items():
        linear = base.linears.get(module)
        if linear is not None and isinstance(parts, list):
            share = 1 if "delta" in parts or "mask" in parts else 16 if "signs" in parts else 0
            total += linear.out_features * linear.in_features // share if share else 0
    if total > MAX_DENSE_WEIGHTS:
        findings.add("file_too_large", f"{SPARSE_CONFIG}:modules", f"{total} weights", f"at most {MAX_DENSE_WEIGHTS}")


def _check_layout(shapes: Shapes, tensors: TensorFile, findings: Findings) -> None:
    for name, allowed in shapes.items():
        info = tensors.header.tensors.get(name)
        told = " or ".join(str(list(shape)) for shape in allowed)
        if info is None:
            findings.add("missing_tensor", name, "nothing", f"{told} by {SPARSE_CONFIG}")
            continue
        check_dtype(info, ("I32",) if name.endswith(INTEGERS) else FLOAT_DTYPES, findings)
        if info.shape not in allowed:
            findings.add("shape_mismatch", name, list(info.shape), f"{told} (by the base)")
    for name in tensors.header.tensors:
        if name not in shapes:
            findings.add("unexpected_tensor", name, "a tensor of no listed module", f"what {SPARSE_CONFIG} lists")


def check_bits(name: str, words: torch.Tensor, linear: LinearSpec, findings: Findings) -> None:
    """Bits past the last column mean nothing: one that is set tells of another layout."""
    used = linear.in_features % WORD_BITS
    if used and bool(((words[:, -1].long() & 0xFFFFFFFF) >> used).any()):
        findings.add("index_out_of_range", name, "a bit past the last column", f"bits 0 to {linear.in_features - 1}")
