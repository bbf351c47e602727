"""Checks that every format shares: dtypes and values of one tensor, and what an unaccounted tensor is called."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaserve_store.findings import Findings
from deltaserve_store.formats.module_match import is_head
from deltaserve_store.formats.safetensors_header import TensorInfo
from deltaserve_store.spec import BaseSpec

FLOAT_DTYPES = ("F32", "F16", "BF16")
MAX_ABS = 65504.0
"""Largest float16: anything above cannot be served in every dtype, and no trained delta comes near it."""

PEFT_PREFIX = "base_model.model."
_FEATURES = {
    ".lora_magnitude_vector": "DoRA magnitudes",
    ".modules_to_save.": "a fully trained module",
    ".trainable_tokens_delta": "trained token rows",
    ".lora_B.bias": "a trained LoRA bias",
    ".lora_embedding_": "a LoRA on the embedding",
}
_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".base_layer.weight", ".shira_weight", ".shira_indices", ".weight")


def check_dtype(info: TensorInfo, allowed: tuple[str, ...], findings: Findings) -> bool:
    if info.dtype in allowed:
        return True
    findings.add("unsupported_dtype", info.name, info.dtype, ", ".join(allowed))
    return False


def check_shape(info: TensorInfo, expected: tuple[int, ...], why: str, findings: Findings) -> bool:
    if info.shape == expected:
        return True
    findings.add("shape_mismatch", info.name, list(info.shape), f"{list(expected)} ({why})")
    return False


def check_values(name: str, values: Tensor, findings: Findings) -> bool:
    """Finite and at most ``MAX_ABS`` in absolute value; one pass, no copy."""
    low, high = (float(value) for value in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        findings.add("non_finite", name, f"min {low}, max {high}", "finite values")
        return False
    if max(-low, high) > MAX_ABS:
        findings.add("value_out_of_range", name, f"{max(-low, high):g}", f"at most {MAX_ABS:g}")
        return False
    return True


def name_stray_tensor(name: str, base: BaseSpec, findings: Findings) -> None:
    """Says why a tensor of a PEFT file has no place: a feature not served, a head, an unknown layer, or just extra."""
    module = name.removeprefix(PEFT_PREFIX)
    for marker, feature in _FEATURES.items():
        if marker in f"{module}.":
            findings.add(
                "unsupported_feature", name, feature, "what the config announces, of the features that are served"
            )
            return
    for suffix in _SUFFIXES:
        module = module.removesuffix(suffix)
    if is_head(module):
        findings.add("unsupported_target", name, module, "linears of the decoder layers")
    elif module in base.linears:
        findings.add("unexpected_tensor", name, "a tensor the config does not account for", "only targeted tensors")
    else:
        findings.add("unknown_module", name, module, "names of linears of the base")
