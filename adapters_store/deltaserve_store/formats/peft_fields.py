"""Every field of a PEFT config that is known here, and what becomes of it. One table a kind; docs are made from it.

A field is *understood* (it changes the maths and is applied), *descriptive* (it says how the adapter came to be; any
well-formed value is accepted and nothing follows from it) or *neutral-only* (a feature that is not served: refused by
name unless it is switched off). A field in no table is refused as unknown: what it would change is not known.
"""

from __future__ import annotations

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
_ONLY = re.compile(r"[A-Za-z0-9]{1,32}_only")
Treatment = Literal["understood", "descriptive", "neutral-only"]


@dataclass(frozen=True, slots=True)
class FieldRule:
    """``accepts`` decides over a value that JSON gave; a refusal carries ``code``.

    ``per_key`` judges the values of an object one by one (patterns), so that a refusal can name the keys at fault.
    """

    treatment: Treatment
    accepts: Callable[[Any], bool]
    allowed: str
    code: str = "invalid_value"
    required: bool = False
    per_key: Callable[[Any], bool] | None = None


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= MAX_TEXT)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_rank(value: Any) -> bool:
    return is_int(value) and 1 <= value <= MAX_RANK


def is_alpha(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= MAX_ALPHA


def is_fraction(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= 1


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MAX_TARGETS
        and all(isinstance(item, str) and MODULE_NAME.fullmatch(item) for item in value)
    )


def _is_targets(value: Any) -> bool:
    return (isinstance(value, str) and value.lower() == "all-linear") or (_is_names(value) and bool(value))


def _is_layers(value: Any) -> bool:
    if value is None or is_int(value):
        return True
    return isinstance(value, list) and len(value) <= MAX_TARGETS and all(is_int(item) for item in value)


def _is_layers_pattern(value: Any) -> bool:
    if value is None:
        return True
    items = [value] if isinstance(value, str) else value
    return (
        isinstance(items, list)
        and len(items) <= 16
        and all(isinstance(item, str) and (not item or LAYERS_PATTERN.fullmatch(item)) for item in items)
    )


def is_pattern(value: Any, accepts: Callable[[Any], bool]) -> bool:
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


def one_of(*values: Any) -> Callable[[Any], bool]:
    # 0 == False and 1 == True in Python; the type tells them apart.
    return lambda value: any(type(value) is type(allowed) and value == allowed for allowed in values)


def off(*neutral: Any, why: str = "not served with this kind") -> FieldRule:
    shown = " or ".join("null" if value is None else str(value).lower() for value in neutral)
    return FieldRule("neutral-only", one_of(*neutral), f"{shown} ({why})", "unsupported_feature")


TEXT = FieldRule("descriptive", is_text, f"null or a string of at most {MAX_TEXT} characters")
FLAG = FieldRule("descriptive", is_bool, "true or false")
NUMBER = FieldRule("descriptive", lambda value: isinstance(value, int | float), "a number")
INTEGER = FieldRule("descriptive", is_int, "an integer")
SWITCH = FieldRule("understood", is_bool, "true or false")
SEED = FieldRule("understood", lambda value: is_int(value) and 0 <= value < 1 << 63, "an integer of 63 bits")
LENGTH = FieldRule(
    "understood", lambda value: is_int(value) and 1 <= value <= 1 << 24, "an integer above 0", required=True
)
"""Of a trained vector that stands for all of an adapter."""

SAVED = FieldRule(
    "understood",
    lambda value: value is None or _is_names(value),
    "null or names of the embedding, the head, norms or linears",
)
COMMON_FIELDS: dict[str, FieldRule] = {
    "peft_type": FieldRule("understood", is_text, "a type listed in docs/adapter-kinds.md", required=True),
    "task_type": FieldRule(
        "understood", one_of(None, "CAUSAL_LM"), "null or CAUSAL_LM (other tasks bring a head)", "unsupported_feature"
    ),
    "base_model_name_or_path": FieldRule("understood", is_text, f"null or at most {MAX_TEXT} characters"),
    "target_modules": FieldRule(
        "understood", _is_targets, "a list of module names or path endings, or all-linear", required=True
    ),
    "fan_in_fan_out": FieldRule("understood", is_bool, "true or false, as the base stores its weights"),
    "modules_to_save": SAVED,
    "auto_mapping": FieldRule("descriptive", _is_auto_mapping, "null or base_model_class and parent_library"),
    "peft_version": TEXT,
    "revision": TEXT,
    "inference_mode": FLAG,
}

SELECTION_FIELDS: dict[str, FieldRule] = {
    "exclude_modules": FieldRule(
        "understood", lambda value: value is None or _is_names(value), "null or a list of module names"
    ),
    "layers_to_transform": FieldRule("understood", _is_layers, "null, an integer or a list of integers"),
    "layers_pattern": FieldRule("understood", _is_layers_pattern, "null, a module name or a list of them"),
}
LAYER_FIELDS = {name: rule for name, rule in SELECTION_FIELDS.items() if name != "exclude_modules"}
"""Of the kinds whose configs exclude nothing."""
RANK = FieldRule("understood", is_rank, f"an integer from 1 to {MAX_RANK}", "rank_out_of_range", required=True)
ALPHA = FieldRule("understood", is_alpha, f"a number above 0, at most {MAX_ALPHA:g}", required=True)
RANK_PATTERN = FieldRule(
    "understood",
    lambda value: is_pattern(value, is_rank),
    f"module paths to ranks from 1 to {MAX_RANK}",
    per_key=is_rank,
)
ALPHA_PATTERN = FieldRule(
    "understood", lambda value: is_pattern(value, is_alpha), "module paths to numbers above 0", per_key=is_alpha
)
BIAS = FieldRule(
    "understood",
    lambda value: isinstance(value, str) and (value in ("none", "all") or _ONLY.fullmatch(value) is not None),
    "none, all, or the kind's name and _only",
)
FRACTION = FieldRule("descriptive", is_fraction, "a number from 0 to 1")

_BESIDE_INITIAL = FieldRule(
    "neutral-only", one_of(None), "null, or an object beside initial_model.safetensors", "unsupported_feature"
)

LORA_FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        **COMMON_FIELDS,
        "r": RANK,
        "lora_alpha": ALPHA,
        "use_rslora": FieldRule("understood", is_bool, "true or false"),
        "rank_pattern": RANK_PATTERN,
        "alpha_pattern": ALPHA_PATTERN,
        **SELECTION_FIELDS,
        "bias": BIAS,
        "init_lora_weights": FieldRule(
            "understood",
            one_of(True, False, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora"),
            "true, false, gaussian, orthogonal, eva, mica, pissa or olora; beside initial_model.safetensors also "
            "pissa_niter_N, corda and lora_ga (save with path_initial_model_for_weight_conversion, or upload the "
            "initial factors too); never loftq (what quantising took from the base is in no file)",
            "unsupported_feature",
        ),
        "lora_dropout": FRACTION,
        "eva_config": FieldRule("descriptive", _is_object, "null or an object"),
        "megatron_core": TEXT,
        "qalora_group_size": FieldRule("descriptive", is_int, "an integer"),
        "runtime_config": FieldRule("descriptive", _is_object, "null or an object"),
        "ensure_weight_tying": FLAG,
        "use_dora": off(False),
        "lora_bias": off(False),
        "use_qalora": off(False, why="it trains beside a GPTQ base, which is another one"),
        "loftq_config": off(None, {}, why="it trains beside a quantised base, which is in no file"),
        "corda_config": _BESIDE_INITIAL,
        "lora_ga_config": _BESIDE_INITIAL,
        "velora_config": off(None),
        "monteclora_config": off(None),
        "kasa_config": off(None),
        "arrow_config": off(None, why="it routes between other adapters by the input"),
        "use_bdlora": off(None, False),
        "megatron_config": off(None, why="its factors are shards of several processes"),
        "layer_replication": off(None, why="it gives the model layers that the base does not have"),
        "trainable_token_indices": off(None),
        "target_parameters": off(None, [], why="parameters that are no linear's: experts, which no served base has"),
        "alora_invocation_tokens": off(None),
        "enable_lora": off(None, why="merged linears of an early PEFT"),
        "merge_weights": off(False, why="factors that were merged into a base are none any more"),
    }
)

SHIRA_FIELDS: Mapping[str, FieldRule] = MappingProxyType(
    {
        **COMMON_FIELDS,
        "r": RANK,
        "mask_type": FieldRule("descriptive", is_text, "a string"),
        "random_seed": FieldRule("descriptive", lambda value: value is None or is_int(value), "null or an integer"),
        "init_weights": FLAG,
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
    accepts = rule.per_key
    if accepts is None or not isinstance(value, dict) or len(value) > MAX_PATTERN_KEYS:
        findings.add(rule.code, f"{where}:{field}", value, rule.allowed)
        return
    for key, item in value.items():
        if not is_pattern_key(key):
            findings.add("regex_target", f"{where}:{field}", key, "a module path; '\\d+' may stand for a number")
        elif not accepts(item):
            code = "rank_out_of_range" if accepts is is_rank else rule.code
            findings.add(code, f"{where}:{field}:{key}", item, rule.allowed)
