"""Activated LoRA (arXiv:2504.12397): a LoRA that begins in mid-sequence, at the last invocation in the prompt.

The file is a LoRA's; ``alora_invocation_tokens`` of its config is the invocation, tokenized. Positions before its last
occurrence in the prompt are the base's, all later ones the adapter's; without an occurrence the base answers alone.
Source: peft 0.21, ``tuners/lora/variants.py`` (``calculate_alora_offsets``, ``ALoraLinearVariant``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import FieldRule, check_fields, is_int
from deltaserve_store.spec import BaseSpec

FIELD = "alora_invocation_tokens"
MAX_INVOCATION = 64


def _is_invocation(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and 1 <= len(value) <= MAX_INVOCATION and all(is_int(i) and i >= 0 for i in value)


FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {FIELD: FieldRule("understood", _is_invocation, f"null, or 1 to {MAX_INVOCATION} token ids of the base")}
)


def take_invocation(
    config: Mapping[str, Any], base: BaseSpec, where: str, findings: Findings
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The config with the field switched off, and the invocation, empty for a LoRA that always acts.

    PEFT activates A and B alone: trained biases would act at every position, and magnitudes have no such form.
    """
    plain = {field: None if field == FIELD else value for field, value in config.items()}
    check_fields({FIELD: config.get(FIELD)}, FIELDS, where, findings)
    invocation = config.get(FIELD)
    if invocation is None or not _is_invocation(invocation):
        return plain, ()
    limit = base.num_tokens or base.vocab_size
    if max(invocation) >= limit:
        findings.add("invalid_value", f"{where}:{FIELD}", max(invocation), f"token ids below {limit}")
    for field, neutral in (("bias", "none"), ("use_dora", False)):
        given = config.get(field, neutral)
        if given != neutral:
            shown = str(neutral).lower()
            findings.add("unsupported_feature", f"{where}:{field}", given, f"{shown} with {FIELD}")
    return plain, tuple(invocation)


def check_alone(where: str, findings: Findings, **others: bool) -> None:
    """``others``: what an invoked LoRA has beside A and B of the layers' linears, which would act at every position."""
    for what in (name for name, is_there in others.items() if is_there):
        allowed = f"A and B of the layers' linears alone with {FIELD}"
        findings.add("unsupported_feature", f"{where}:{FIELD}", what.replace("_", " "), allowed)
