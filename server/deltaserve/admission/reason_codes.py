"""Codes of refusals that only a running base can find; the store's own are in ``deltaserve_store.reason_codes``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

PROOF_REASON_CODES: Mapping[str, str] = MappingProxyType(
    {
        "conversion_error": "The best low-rank terms for the adapter's deltas change the logits more than is allowed.",
        "duplicate_module": "Two deltas for one linear layer.",
        "no_effect": "No logit of the probe tokens changes; send accept_no_effect=true to keep it all the same.",
        "non_finite_output": "With the adapter, the model answers NaN or infinity.",
        "proof_failed": "What the engine answers with the adapter differs from the folded weights.",
        "unknown_chat_template": "The adapter names a chat template that the operator has not registered.",
    }
)
