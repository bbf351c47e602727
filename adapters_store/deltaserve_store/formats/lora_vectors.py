"""What a PEFT LoRA file may hold beside A and B: trained biases and the magnitudes of DoRA.

``bias="lora_only"`` saves the biases of targeted linears (``<module>.base_layer.bias``), ``"all"`` those of every other
linear and norm too (``<module>.bias``); both are the trained values, which stand in place of the base's. ``lora_bias``
gives B a bias of its own (``<module>.lora_B.bias``), scaled as B is. ``use_dora`` saves
``<module>.lora_magnitude_vector``.
Source: peft 0.21, ``utils/save_and_load.py``, ``tuners/lora/{layer,dora}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats import activated_lora
from deltaserve_store.formats.lora_variants import FIELDS as VARIANT_FIELDS
from deltaserve_store.formats.lora_vocabulary import FIELDS as VOCABULARY_FIELDS
from deltaserve_store.formats.peft_fields import LORA_FIELDS, FieldRule, check_fields
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, PEFT_PREFIX, check_dtype, check_shape, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

BIASES = ("none", "lora_only", "all")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        "bias": FieldRule("understood", lambda value: value in BIASES, "none, lora_only or all"),
        "use_dora": FieldRule("understood", _is_flag, "true or false"),
        "lora_bias": FieldRule("understood", _is_flag, "true or false; false with use_dora"),
    }
)
PEFT_LORA_FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {**LORA_FIELDS, **VOCABULARY_FIELDS, **VARIANT_FIELDS, **FIELDS, **activated_lora.FIELDS}
)
"""Every field of a LoRA config with what is served of it."""


def vector_names(module: str) -> tuple[str, ...]:
    """Every vector that a file may hold for a linear."""
    parts = ("lora_magnitude_vector", "lora_B.bias", "base_layer.bias", "bias")
    return tuple(f"{PEFT_PREFIX}{module}.{part}" for part in parts)


def split_config(config: Mapping[str, Any], where: str, findings: Findings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of ``FIELDS``, checked and with their defaults, and the config with these fields switched off."""
    own = {"bias": "none", "use_dora": False, "lora_bias": False}
    given = {field: value for field, value in config.items() if field in FIELDS}
    check_fields(given, FIELDS, where, findings)
    if given.get("use_dora") is True and given.get("lora_bias") is True:
        findings.add("invalid_value", f"{where}:lora_bias", True, "false with use_dora")
    plain = {field: own.get(field, value) for field, value in config.items()}
    return plain, own | given


class LoraVectors:
    """The vectors that a file with these targets must hold."""

    def __init__(self, options: Mapping[str, Any], modules: tuple[str, ...], base: BaseSpec) -> None:
        self._magnitudes = {m: f"{PEFT_PREFIX}{m}.lora_magnitude_vector" for m in modules if options["use_dora"]}
        self._own_biases = {m: f"{PEFT_PREFIX}{m}.lora_B.bias" for m in modules if options["lora_bias"]}
        self._biases: dict[str, str] = {}
        self._shifts: dict[str, str] = {}
        for name, linear in base.linears.items() if options["bias"] != "none" else ():
            if name in modules and linear.has_bias:
                self._biases[name] = f"{PEFT_PREFIX}{name}.base_layer.bias"
            elif linear.has_bias and options["bias"] == "all":
                self._biases[name] = f"{PEFT_PREFIX}{name}.bias"
        if options["bias"] == "all":
            self._shifts = {name: f"{PEFT_PREFIX}{name}.bias" for name, norm in base.norms.items() if norm.has_bias}
        self.sizes: dict[str, int] = {}
        for names in (self._magnitudes, self._own_biases, self._biases):
            self.sizes |= {tensor: base.linears[module].out_features for module, tensor in names.items()}
        self.sizes |= {tensor: base.norms[norm].size for norm, tensor in self._shifts.items()}

    def check_layout(self, tensors: TensorFile, findings: Findings) -> None:
        """Every vector is there, of the base's size."""
        for name, size in self.sizes.items():
            info = tensors.header.tensors.get(name)
            if info is None:
                findings.add("missing_tensor", name, "nothing", f"[{size}] by bias, lora_bias or use_dora")
                continue
            check_dtype(info, FLOAT_DTYPES, findings)
            check_shape(info, (size,), "by the base", findings)

    def read(self, tensors: TensorFile, findings: Findings) -> dict[str, Tensor]:
        """All vectors by tensor name, checked for their values."""
        found = {name: tensors.read(name) for name in self.sizes}
        for name, values in found.items():
            check_values(name, values, findings)
        return found

    def magnitude(self, module: str, found: Mapping[str, Tensor]) -> Tensor | None:
        return found.get(self._magnitudes.get(module, ""))

    def deltas(self, found: Mapping[str, Tensor], scalings: Mapping[str, float]) -> list[VectorDelta | NormDelta]:
        """Biases of linears and norms; ``scalings`` are the factors of B."""
        made: list[VectorDelta | NormDelta] = []
        for module in dict.fromkeys([*self._own_biases, *self._biases]):
            own = found.get(self._own_biases.get(module, ""))
            bias = None if own is None else own.float() * scalings[module]
            made.append(VectorDelta(module, bias=bias, new_bias=found.get(self._biases.get(module, ""))))
        return made + [NormDelta(norm, shift=found[name], replaces=True) for norm, name in self._shifts.items()]
