"""Every field of a PEFT config that is known here, and what becomes of it. One table a kind; docs are made from it.

A field is *understood* (it changes the maths and is applied), *descriptive* (it says how the adapter came to be; any
well-formed value is accepted and nothing follows from it) or *neutral-only* (a feature that is not served: refused by
name unless it is switched off). A field in no table is refused as unknown: what it would change is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from deltaserve_store.findings import Findings
from deltaserve_store.formats.module_match import (
    LAYERS_PATTERN,
    MAX_PATTERN_KEYS,
    MODULE_NAME,
    is_pattern_key,
)

MAX_RANK = 1024
MAX_ALPHA = 65536.0
MAX_TEXT = 1024
MAX_TARGETS = 20_000
Treatment = Literal["understood", "descriptive", "neutral-only"]


@dataclass(frozen=True, slots=True)
class FieldRule:
    """``accepts`` decides over a value that JSON gave; a refusal carries ``code``."""

    treatment: Treatment
    accepts: Callable[[Any], bool]
    allowed: str
    code: str = "invalid_value"
    required: bool = False


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= MAX_TEXT)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_rank(value: Any) -> bool:
    return _is_int(value) and 1 <= value <= MAX_RANK


def is_alpha(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= MAX_ALPHA


def _is_fraction(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= 1


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_TARGETS
        and all(isinstance(item, str) and MODULE_NAME.fullmatch(item) for item in value)
    )


def _is_targets(value: Any) -> bool:
    return (isinstance(value, str) and value.lower() == "all-linear") or (_is_names(value) and bool(value))


def _is_layers(value: Any) -> bool:
    if value is None or _is_int(value):
        return True
    return isinstance(value, list) and len(value) <= MAX_TARGETS and all(_is_int(item) for item in value)


def _is_layers_pattern(value: Any) -> bool:
    if value is None:
        return True
    items = [value] if isinstance(value, str) else value
    return (
        isinstance(items, list)
        and len(items) <= 16
        and all(isinstance(item, str) and (not item or LAYERS_PATTERN.fullmatch(item)) for item in items)
    )


def _is_pattern(value: Any, accepts: Callable[[Any], bool]) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and len(value) <= MAX_PATTERN_KEYS
        and all(is_pattern_key(key) and accepts(item) for key, item in value.items())
    )


def _is_auto_mapping(value: Any) -> bool:
    """PEFT writes two class names when the task type is not given (one tool adds a flag). They are never imported."""
    if value is None:
        return True
    plain = re.compile(r"[A-Za-z0-9_.]{1,256}")
    return isinstance(value, dict) and all(
        (key == "unsloth_fixed" and isinstance(item, bool))
        or (key in ("base_model_class", "parent_library") and isinstance(item, str) and plain.fullmatch(item))
        for key, item in value.items()
    )


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _one_of(*values: Any) -> Callable[[Any], bool]:
    # 0 == False and 1 == True in Python; the type tells them apart.
    return lambda value: any(type(value) is type(allowed) and value == allowed for allowed in values)


def _off(*neutral: Any) -> FieldRule:
    shown = " or ".join("null" if value is None else str(value).lower() for value in neutral)
    return FieldRule("neutral-only", _one_of(*neutral), f"{shown} (not served yet)", "unsupported_feature")


_TEXT = FieldRule("descriptive", _is_text, f"null or a string of at most {MAX_TEXT} characters")
_FLAG = FieldRule("descriptive", _is_bool, "true or false")

_COMMON: dict[str, FieldRule] = {
    "peft_type": FieldRule("understood", _is_text, "LORA or SHIRA", required=True),
    "task_type": FieldRule(
        "understood", _one_of(None, "CAUSAL_LM"), "null or CAUSAL_LM (other tasks bring a head)", "unsupported_feature"
    ),
    "base_model_name_or_path": FieldRule("understood", _is_text, f"null or at most {MAX_TEXT} characters"),
    "target_modules": FieldRule(
        "understood", _is_targets, "a list of module names or path endings, or all-linear", required=True
    ),
    "fan_in_fan_out": FieldRule("understood", _is_bool, "true or false, as the base stores its weights"),
    "modules_to_save": _off(None, []),
    "auto_mapping": FieldRule("descriptive", _is_auto_mapping, "null or base_model_class and parent_library"),
    "peft_version": _TEXT,
    "revision": _TEXT,
    "inference_mode": _FLAG,
}

LORA_FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        **_COMMON,
        "r": FieldRule("understood", is_rank, f"an integer from 1 to {MAX_RANK}", "rank_out_of_range", required=True),
        "lora_alpha": FieldRule("understood", is_alpha, f"a number above 0, at most {MAX_ALPHA:g}", required=True),
        "use_rslora": FieldRule("understood", _is_bool, "true or false"),
        "rank_pattern": FieldRule(
            "understood", lambda value: _is_pattern(value, is_rank), f"module paths to ranks from 1 to {MAX_RANK}"
        ),
        "alpha_pattern": FieldRule(
            "understood", lambda value: _is_pattern(value, is_alpha), "module paths to numbers above 0"
        ),
        "exclude_modules": FieldRule(
            "understood", lambda value: value is None or _is_names(value), "null or a list of module names"
        ),
        "layers_to_transform": FieldRule("understood", _is_layers, "null, an integer or a list of integers"),
        "layers_pattern": FieldRule("understood", _is_layers_pattern, "null, a module name or a list of them"),
        "bias": FieldRule(
            "understood", _one_of("none"), "none (trained biases are not served yet)", "unsupported_feature"
        ),
        "init_lora_weights": FieldRule(
            "understood",
            _one_of(True, False, "gaussian", "orthogonal", "eva"),
            "true, false, gaussian, orthogonal or eva (others change the base; convert the adapter when saving)",
            "unsupported_feature",
        ),
        "lora_dropout": FieldRule("descriptive", _is_fraction, "a number from 0 to 1"),
        "eva_config": FieldRule("descriptive", _is_object, "null or an object"),
        "megatron_core": _TEXT,
        "qalora_group_size": FieldRule("descriptive", _is_int, "an integer"),
        "runtime_config": FieldRule("descriptive", _is_object, "null or an object"),
        "ensure_weight_tying": _FLAG,
        "use_dora": _off(False),
        "lora_bias": _off(False),
        "use_qalora": _off(False),
        "loftq_config": _off(None, {}),
        "corda_config": _off(None),
        "lora_ga_config": _off(None),
        "velora_config": _off(None),
        "monteclora_config": _off(None),
        "kasa_config": _off(None),
        "arrow_config": _off(None),
        "use_bdlora": _off(None, False),
        "megatron_config": _off(None),
        "layer_replication": _off(None),
        "trainable_token_indices": _off(None),
        "target_parameters": _off(None, []),
        "alora_invocation_tokens": _off(None),
        "enable_lora": _off(None),
        "merge_weights": _off(False),
    }
)

SHIRA_FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        **_COMMON,
        "r": FieldRule("understood", is_rank, f"an integer from 1 to {MAX_RANK}", "rank_out_of_range", required=True),
        "mask_type": FieldRule("descriptive", _is_text, "a string"),
        "random_seed": FieldRule("descriptive", lambda value: value is None or _is_int(value), "null or an integer"),
        "init_weights": _FLAG,
    }
)


def _is_regex(field: str, value: Any) -> bool:
    """PEFT takes a string here as a regular expression."""
    if field == "target_modules":
        return isinstance(value, str) and not _is_targets(value)
    return field == "exclude_modules" and isinstance(value, str)


def check_fields(config: Mapping[str, Any], rules: Mapping[str, FieldRule], where: str, findings: Findings) -> None:
    """Holds a config against its table: unknown, missing and refused fields, each named."""
    for field, value in config.items():
        rule = rules.get(field)
        if rule is None:
            findings.add("unknown_field", f"{where}:{field}", value, "only fields listed in docs/adapter-format.md")
        elif _is_regex(field, value):
            findings.add("regex_target", f"{where}:{field}", value, rule.allowed)
        elif not rule.accepts(value):
            _add_refusal(field, value, rule, where, findings)
    for field, rule in rules.items():
        if rule.required and field not in config:
            findings.add("missing_field", f"{where}:{field}", "nothing", rule.allowed)


def _add_refusal(field: str, value: Any, rule: FieldRule, where: str, findings: Findings) -> None:
    """Patterns name the keys at fault; other fields the value."""
    accepts = {"rank_pattern": is_rank, "alpha_pattern": is_alpha}.get(field)
    if accepts is None or not isinstance(value, dict) or len(value) > MAX_PATTERN_KEYS:
        findings.add(rule.code, f"{where}:{field}", value, rule.allowed)
        return
    for key, item in value.items():
        if not is_pattern_key(key):
            findings.add("regex_target", f"{where}:{field}", key, "a module path; '\\d+' may stand for a number")
        elif not accepts(item):
            code = "rank_out_of_range" if field == "rank_pattern" else rule.code
            findings.add(code, f"{where}:{field}:{key}", item, rule.allowed)
