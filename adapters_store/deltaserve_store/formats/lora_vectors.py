"""What a PEFT LoRA file may hold beside A and B: trained biases and the magnitudes of DoRA.

``bias`` is that of every kind (``trained_biases``). ``lora_bias`` gives B a bias of its own (``<module>.lora_B.bias``),
scaled as B is; that of an embedding has none. ``use_dora`` saves ``<module>.lora_magnitude_vector``: [out], of an
embedding one for each number of a row. All of them may be there of the head, too.
Source: peft 0.21, ``utils/save_and_load.py``, ``tuners/lora/{layer,dora}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats import activated_lora
from deltaserve_store.formats.bias_repeats import BiasRepeats
from deltaserve_store.formats.lora_variants import FIELDS as VARIANT_FIELDS
from deltaserve_store.formats.lora_vocabulary import FIELDS as VOCABULARY_FIELDS
from deltaserve_store.formats.peft_fields import LORA_FIELDS, FieldRule, check_fields
from deltaserve_store.formats.saved_modules import SavedModules
from deltaserve_store.formats.tensor_checks import PEFT_PREFIX
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.formats.trained_biases import TrainedBiases, check_vectors, read_vectors
from deltaserve_store.spec import BaseSpec
from deltaserve_store.vector_deltas import NormDelta, VectorDelta

BIASES = ("none", "lora_only", "all")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        "bias": FieldRule("understood", lambda value: value in BIASES, "none, lora_only or all"),
        "use_dora": FieldRule("understood", _is_flag, "true or false"),
        "lora_bias": FieldRule(
            "understood", _is_flag, "true or false; false with use_dora and with the embedding as a target"
        ),
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
    """The vectors that a file with these targets must hold: of linears, and of embedding and head (``matrices``)."""

    def __init__(
        self,
        options: Mapping[str, Any],
        modules: tuple[str, ...],
        matrices: Sequence[str],
        base: BaseSpec,
        saved: SavedModules,
        tensors: TensorFile,
    ) -> None:
        linears = {**base.linears, **base.vocabulary}
        own = (*modules, *matrices)
        self._magnitudes = {m: f"{PEFT_PREFIX}{m}.lora_magnitude_vector" for m in own if options["use_dora"]}
        self._own_biases = {m: f"{PEFT_PREFIX}{m}.lora_B.bias" for m in own if options["lora_bias"]}
        self._biases = TrainedBiases(options["bias"], own, base, saved.modules)
        self._repeats_of_biases = BiasRepeats(options["bias"], saved, tensors)
        # Written once more where PEFT saves the matrix of an embedding that is called other than it expects.
        self._repeats = {
            f"{self._magnitudes[m]}.weight": self._magnitudes[m] for m in matrices if m in self._magnitudes
        }
        self.sizes: dict[str, int] = {}
        for names in (self._magnitudes, self._own_biases):
            self.sizes |= {tensor: linears[module].out_features for module, tensor in names.items()}
        self.sizes |= self._biases.sizes

    @property
    def names(self) -> set[str]:
        """Tensors that are accounted for."""
        return {*self.sizes, *self._repeats, *self._repeats_of_biases.names}

    def check_layout(self, tensors: TensorFile, findings: Findings) -> None:
        """Every vector is there, of the base's size."""
        check_vectors(self.sizes, "bias, lora_bias or use_dora", tensors, findings)
        self._repeats_of_biases.check_layout(tensors, findings)

    def read(self, tensors: TensorFile, findings: Findings) -> dict[str, Tensor]:
        """All vectors by tensor name, checked for their values."""
        found = read_vectors(self.sizes, tensors, findings)
        self._repeats_of_biases.check_values(tensors, findings)
        for name, own in self._repeats.items():
            if name in tensors.header.tensors and not torch.equal(tensors.read(name), found[own]):
                findings.add("shape_mismatch", name, "other magnitudes", f"those of {own}")
        return found

    def magnitude(self, module: str, found: Mapping[str, Tensor]) -> Tensor | None:
        return found.get(self._magnitudes.get(module, ""))

    def deltas(self, found: Mapping[str, Tensor], scalings: Mapping[str, float]) -> list[VectorDelta | NormDelta]:
        """Biases of linears and norms; ``scalings`` are the factors of B."""
        made: list[VectorDelta | NormDelta] = []
        trained = self._biases.of_linears
        for module in dict.fromkeys([*self._own_biases, *trained]):
            own = found.get(self._own_biases.get(module, ""))
            bias = None if own is None else own.float() * scalings[module]
            made.append(VectorDelta(module, bias=bias, new_bias=found.get(trained.get(module, ""))))
        return made + self._biases.norm_deltas(found)
