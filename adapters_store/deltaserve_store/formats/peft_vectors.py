"""PEFT kinds that are nothing but vectors: IA3 and LN tuning.

IA3 (Liu et al., arXiv:2205.05638): ``<module>.ia3_l`` [out, 1] multiplies the module's output, its bias included;
[1, in] of a feed-forward module multiplies its input. LN tuning (Zhao et al., arXiv:2312.11420):
``<norm>.ln_tuning_layers.weight`` and ``.bias`` [H] stand in place of the norm's.
Source: peft 0.21, ``tuners/ia3/{layer,model}.py``, ``tuners/ln_tuning/layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from deltaserve_store.findings import Findings
from deltaserve_store.formats.beside import Beside
from deltaserve_store.formats.module_match import TargetRules, is_head
from deltaserve_store.formats.peft_fields import LORA_FIELDS, FieldRule, check_fields
from deltaserve_store.formats.tensor_checks import (
    FLOAT_DTYPES,
    PEFT_PREFIX,
    check_dtype,
    check_shape,
    check_values,
    name_stray_tensor,
)
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import FileFormat, ParsedAdapter
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

_SHARED = ("task_type", "base_model_name_or_path", "target_modules", "exclude_modules", "modules_to_save")
_DESCRIPTIVE = ("auto_mapping", "peft_version", "revision", "inference_mode")
_FLAG = FieldRule("descriptive", lambda value: isinstance(value, bool), "true or false")
_COMMON = {field: LORA_FIELDS[field] for field in (*_SHARED, *_DESCRIPTIVE)}
IA3_FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        "peft_type": FieldRule("understood", lambda value: value == "IA3", "IA3", required=True),
        **_COMMON,
        "feedforward_modules": FieldRule(
            "understood",
            lambda value: value is None or value == [] or LORA_FIELDS["exclude_modules"].accepts(value),
            "a list of the targets whose input is scaled",
            required=True,
        ),
        # The vectors are in the linear's own orientation; the flag steers PEFT's merging alone.
        "fan_in_fan_out": _FLAG,
        "init_ia3_weights": _FLAG,
    }
)
LN_FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        "peft_type": FieldRule("understood", lambda value: value == "LN_TUNING", "LN_TUNING", required=True),
        **_COMMON,
    }
)


def parse_peft_ia3(
    config: Mapping[str, Any], config_name: str, tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    rules = _targets(config, IA3_FIELDS, config_name, findings)
    if rules is None:
        return None
    beside = Beside(config, rules.select(base), tensors, base, config_name, findings)
    modules = beside.targets
    if not modules:
        findings.add("target_not_found", f"{config_name}:target_modules", "no match", "names of linears of the base")
    # PEFT compares endings of the whole path here, without looking for a dot.
    endings = tuple(config.get("feedforward_modules") or ())
    inward = {module for module in modules if module.endswith(endings)}
    shapes = {}
    for module in modules:
        linear = base.linears[module]
        shapes[f"{PEFT_PREFIX}{module}.ia3_l"] = (
            (1, linear.in_features) if module in inward else (linear.out_features, 1)
        )
    found = _read(shapes, beside, tensors, base, findings)
    others = [] if findings else beside.read(tensors, findings)
    if findings:
        return None
    deltas = []
    for module, vector in zip(modules, found.values(), strict=True):
        if module in inward:
            deltas.append(VectorDelta(module, in_scale=vector.flatten()))
        else:
            deltas.append(VectorDelta(module, out_scale=vector.flatten(), scales_bias=True))
    num_parameters = beside.num_parameters + sum(v.numel() for v in found.values())
    return _parsed("peft-ia3", [*deltas, *others], config, num_parameters)


def parse_peft_ln_tuning(
    config: Mapping[str, Any], config_name: str, tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason."""
    rules = _targets(config, LN_FIELDS, config_name, findings)
    if rules is None:
        return None
    targeted = [name for name in base.norms if rules.matches(name)]
    beside = Beside(config, targeted, tensors, base, config_name, findings)
    names = beside.targets
    if not names:
        findings.add("target_not_found", f"{config_name}:target_modules", "no match", "names of norms of the base")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        norm = base.norms[name]
        for part in ("weight", "bias") if norm.has_bias else ("weight",):
            shapes[f"{PEFT_PREFIX}{name}.ln_tuning_layers.{part}"] = (norm.size,)
    found = _read(shapes, beside, tensors, base, findings)
    others = [] if findings else beside.read(tensors, findings)
    if findings:
        return None
    prefixes = [(name, f"{PEFT_PREFIX}{name}.ln_tuning_layers") for name in names]
    deltas = [
        NormDelta(name, found[f"{prefix}.weight"], found.get(f"{prefix}.bias"), replaces=True)
        for name, prefix in prefixes
    ]
    num_parameters = beside.num_parameters + sum(v.numel() for v in found.values())
    return _parsed("peft-ln-tuning", [*deltas, *others], config, num_parameters)


Parser = Callable[[Mapping[str, Any], str, TensorFile, BaseSpec, Findings], ParsedAdapter | None]
VECTOR_READERS: Mapping[str, Parser] = MappingProxyType({"IA3": parse_peft_ia3, "LN_TUNING": parse_peft_ln_tuning})
"""By ``peft_type``."""


def _targets(
    config: Mapping[str, Any], fields: Mapping[str, FieldRule], where: str, findings: Findings
) -> TargetRules | None:
    """None when a field is refused."""
    check_fields(config, fields, where, findings)
    modules = config.get("target_modules")
    named = frozenset(item for item in modules if isinstance(item, str)) if isinstance(modules, list) else None
    for module in sorted(named or ()):
        if is_head(module):
            findings.add("unsupported_target", f"{where}:target_modules", module, "linears or norms of the layers")
    return None if findings else TargetRules(named, excluded=frozenset(config.get("exclude_modules") or ()))


def _read(
    shapes: Mapping[str, tuple[int, ...]], beside: Beside, tensors: TensorFile, base: BaseSpec, findings: Findings
) -> dict[str, Any]:
    """Exactly these tensors and those ``beside``; empty when something is wrong with the header."""
    beside.check_layout(tensors, findings)
    for name, shape in shapes.items():
        info = tensors.header.tensors.get(name)
        if info is None:
            findings.add("missing_tensor", name, "nothing", f"{list(shape)} (targeted)")
            continue
        check_dtype(info, FLOAT_DTYPES, findings)
        check_shape(info, shape, "by the base", findings)
    for name in tensors.header.tensors:
        if name not in shapes and name not in beside.names:
            name_stray_tensor(name, base, findings)
    if findings:
        return {}
    found = {name: tensors.read(name) for name in shapes}
    for name, values in found.items():
        check_values(name, values, findings)
    return found


def _parsed(
    file_format: FileFormat, deltas: list[Any], config: Mapping[str, Any], num_parameters: int
) -> ParsedAdapter:
    return ParsedAdapter(
        kind="vector",
        file_format=file_format,
        deltas=tuple(deltas),
        config=config,
        base_name=config.get("base_model_name_or_path") or None,
        base_fingerprint=None,
        rank=None,
        num_parameters=num_parameters,
    )
