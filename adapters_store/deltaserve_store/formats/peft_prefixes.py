"""PEFT kinds that put virtual tokens before a sequence's own.

Two forms. Prefix tuning (Li and Liang, arXiv:2101.00190) and cartridges (Eyuboglu et al., arXiv:2506.06266) store K and
V of every layer; prompt tuning (Lester et al., arXiv:2104.08691), P-tuning (Liu et al., arXiv:2103.10385), multitask
prompt tuning (Wang et al., arXiv:2303.02861) and CPT (Blau et al., arXiv:2410.17222) store input embeddings. A
projection or an encoder is run by PEFT when it saves and is never in the file. The sequence's own tokens begin at
position ``num_virtual_tokens``.

Source: peft 0.21, ``peft_model.py`` (``get_prompt``, ``get_prompt_embedding_to_save``) and the methods' ``model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from deltaserve_store.findings import Findings
from deltaserve_store.formats.peft_fields import (
    COMMON_FIELDS,
    FLAG,
    FRACTION,
    TEXT,
    FieldRule,
    check_fields,
    is_int,
    off,
    one_of,
)
from deltaserve_store.formats.tensor_checks import FLOAT_DTYPES, check_dtype, check_shape, check_values
from deltaserve_store.formats.tensor_file import TensorFile
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.prefix_deltas import KeyValuePrefix, PrefixDelta, PromptPrefix
from deltaserve_store.spec import BaseSpec

MAX_PROMPT_TOKENS = 1024
"""Most virtual tokens given as embeddings: the door runs them through the base in float32, all at once."""

EMBEDDINGS, TASK_COLS, TASK_ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_MAX_LONG_TEXT = 65536


def _is_count(value: Any) -> bool:
    return is_int(value) and value >= 1


def _is_tokens(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) <= MAX_PROMPT_TOKENS and all(map(is_int, value)))


def _is_long_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= _MAX_LONG_TEXT)


_BY_BASE = FieldRule("understood", lambda value: value is None or _is_count(value), "null, or as the base has it")
_COUNT = FieldRule("descriptive", lambda value: value is None or is_int(value), "null or an integer")
_TOKENS = FieldRule("descriptive", _is_tokens, f"null or a list of at most {MAX_PROMPT_TOKENS} integers")
_NUMBER = FieldRule("descriptive", lambda value: value is None or isinstance(value, int | float), "null or a number")
_LONG_TEXT = FieldRule("descriptive", _is_long_text, f"null or a string of at most {_MAX_LONG_TEXT} characters")
_OBJECT = FieldRule("descriptive", lambda value: value is None or isinstance(value, dict), "null or an object")

_SHARED: dict[str, FieldRule] = {
    **{field: rule for field, rule in COMMON_FIELDS.items() if field not in ("target_modules", "fan_in_fan_out")},
    "modules_to_save": off(None, [], why="PEFT has it beside other kinds"),
    "task_type": FieldRule(
        "understood",
        one_of("CAUSAL_LM"),
        "CAUSAL_LM (PEFT gives virtual tokens to no model without a task)",
        "unsupported_feature",
        required=True,
    ),
    "num_virtual_tokens": FieldRule("understood", _is_count, "an integer of at least 1", required=True),
    "token_dim": _BY_BASE,
    "num_layers": _BY_BASE,
    "num_attention_heads": FieldRule("understood", _BY_BASE.accepts, "null or a number of heads"),
    "num_transformer_submodules": FieldRule("understood", one_of(None, 1), "null or 1", "unsupported_feature"),
}
_PROMPT_TUNING = {
    "prompt_tuning_init": TEXT,
    "prompt_tuning_init_text": _LONG_TEXT,
    "tokenizer_name_or_path": TEXT,
    "tokenizer_kwargs": _OBJECT,
}


@dataclass(frozen=True, slots=True)
class PrefixKind:
    """One PEFT type. ``title``, ``source`` (tensors), ``meaning`` and ``limits`` (what is refused) are for the
    documentation; ``has_keys``: the file holds K and V, not embeddings."""

    title: str
    source: str
    meaning: str
    limits: str
    fields: Mapping[str, FieldRule]
    has_keys: bool = False


_ROWS = "prompt tokens' K and V, by one pass over them"
_GIVEN = "K and V as they are given"
_TOO_MANY = f"more than {MAX_PROMPT_TOKENS} virtual tokens"
PREFIX_KINDS: Mapping[str, PrefixKind] = MappingProxyType(
    {
        "PREFIX_TUNING": PrefixKind(
            "Prefix tuning",
            "`prompt_embeddings` [p, layers · 2 · KV heads · head size]",
            _GIVEN,
            "K and V of other heads than the base's",
            {
                **_SHARED,
                "encoder_hidden_size": _COUNT,
                "prefix_projection": FieldRule("descriptive", FLAG.accepts, "true or false: it is run when saving"),
                "init_weights": FieldRule("descriptive", one_of(None, "zero"), "null or zero"),
            },
            has_keys=True,
        ),
        "CARTRIDGE": PrefixKind(
            "Cartridge",
            "`prompt_embeddings` [p, layers · 2 · KV heads · head size]",
            _GIVEN,
            "K and V of other heads than the base's",
            {**_SHARED, "num_frozen_tokens": _COUNT},
            has_keys=True,
        ),
        "PROMPT_TUNING": PrefixKind(
            "Prompt tuning",
            "`prompt_embeddings` [p, hidden size]",
            _ROWS,
            _TOO_MANY,
            {**_SHARED, **_PROMPT_TUNING},
        ),
        "P_TUNING": PrefixKind(
            "P-tuning",
            "`prompt_embeddings` [p, hidden size]: what the encoder gave",
            _ROWS,
            f"{_TOO_MANY}; a file with the encoder itself (PEFT writes none)",
            {
                **_SHARED,
                "encoder_reparameterization_type": TEXT,
                "encoder_hidden_size": _COUNT,
                "encoder_num_layers": _COUNT,
                "encoder_dropout": FRACTION,
            },
        ),
        "MULTITASK_PROMPT_TUNING": PrefixKind(
            "Multitask prompt tuning",
            "`prompt_embeddings` [p, hidden], `prefix_task_cols` [1, p, r], `prefix_task_rows` [1, r, hidden]",
            f"{_ROWS}; the embeddings are `prompt ∘ (cols rows)`",
            f"{_TOO_MANY}; a file of several tasks",
            {
                **_SHARED,
                **_PROMPT_TUNING,
                "prompt_tuning_init_state_dict_path": TEXT,
                "prompt_tuning_init_task": _COUNT,
                "num_ranks": FieldRule("understood", _is_count, "an integer of at least 1"),
                "num_tasks": FieldRule(
                    "understood",
                    one_of(1),
                    "1: a request names no task; save one, with prompt_tuning_init EXACT_SOURCE_TASK",
                    "unsupported_feature",
                ),
            },
        ),
        "CPT": PrefixKind(
            "CPT",
            "`prompt_embeddings` [p, hidden size]: tokens and their trained difference",
            _ROWS,
            _TOO_MANY,
            {
                **_SHARED,
                "cpt_token_ids": _TOKENS,
                "cpt_mask": _TOKENS,
                "cpt_tokens_type_mask": _TOKENS,
                "opt_weighted_loss_type": TEXT,
                "opt_loss_decay_factor": _NUMBER,
                "opt_projection_epsilon": _NUMBER,
                "opt_projection_format_epsilon": _NUMBER,
                "tokenizer_name_or_path": TEXT,
            },
        ),
    }
)
"""By ``peft_type``."""


def parse_peft_prefix(
    kind: str, config: Mapping[str, Any], where: str, tensors: TensorFile, base: BaseSpec, findings: Findings
) -> ParsedAdapter | None:
    """None when ``findings`` got a reason. Shapes are settled from the header before a tensor is read."""
    _check_config(kind, config, where, base, findings)
    if findings:
        return None
    shapes = _shapes(kind, config, base)
    why = "by the config and the base"
    for name, shape in shapes.items():
        info = tensors.header.tensors.get(name)
        if info is None:
            findings.add("missing_tensor", name, "nothing", f"{list(shape)} ({why})")
            continue
        check_dtype(info, FLOAT_DTYPES, findings)
        check_shape(info, shape, why, findings)
    for name in tensors.header.tensors:
        if name not in shapes:
            allowed = f"only {', '.join(shapes)}: PEFT saves what an encoder gives, never the encoder"
            findings.add("unexpected_tensor", name, "a tensor the config does not account for", allowed)
    if findings:
        return None
    found = {name: tensors.read(name) for name in shapes}
    for name, values in found.items():
        check_values(name, values, findings)
    if findings:
        return None
    prefix: PrefixDelta
    if PREFIX_KINDS[kind].has_keys:
        prefix = KeyValuePrefix(found[EMBEDDINGS])
    elif kind == "MULTITASK_PROMPT_TUNING":
        prefix = PromptPrefix(found[EMBEDDINGS], found[TASK_COLS][0], found[TASK_ROWS][0])
    else:
        prefix = PromptPrefix(found[EMBEDDINGS])
    return ParsedAdapter(
        kind="prefix",
        file_format=f"peft-{kind.lower().replace('_', '-')}",
        deltas=(),
        config=config,
        base_name=config.get("base_model_name_or_path") or None,
        base_fingerprint=None,
        rank=None,
        num_parameters=sum(values.numel() for values in found.values()),
        prefix=prefix,
    )


def _check_config(kind: str, config: Mapping[str, Any], where: str, base: BaseSpec, findings: Findings) -> None:
    """The fields one by one, then against each other and the base."""
    check_fields(config, PREFIX_KINDS[kind].fields, where, findings)
    if findings:
        return
    count = config["num_virtual_tokens"]
    if PREFIX_KINDS[kind].has_keys:
        wanted = {
            "token_dim": base.kv_heads * base.head_dim,
            "num_layers": base.num_layers,
            "num_attention_heads": base.kv_heads,
        }
    else:
        wanted = {"token_dim": base.hidden_size, "num_layers": base.num_layers}
        if count > MAX_PROMPT_TOKENS:
            findings.add("prefix_too_long", f"{where}:num_virtual_tokens", count, f"at most {MAX_PROMPT_TOKENS}")
    for field, value in wanted.items():
        if config.get(field) not in (None, value):
            findings.add("shape_mismatch", f"{where}:{field}", config[field], f"{value} (by the base)")
    if kind == "CPT":
        ids = config.get("cpt_token_ids") or [0]
        if len(ids) != count:
            findings.add("invalid_value", f"{where}:num_virtual_tokens", count, f"{len(ids)}, as many as cpt_token_ids")


def _shapes(kind: str, config: Mapping[str, Any], base: BaseSpec) -> dict[str, tuple[int, ...]]:
    count = config["num_virtual_tokens"]
    if PREFIX_KINDS[kind].has_keys:
        return {EMBEDDINGS: (count, base.num_layers * 2 * base.kv_heads * base.head_dim)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (count, base.hidden_size)}
    if kind == "MULTITASK_PROMPT_TUNING":
        ranks = config.get("num_ranks", 1)
        shapes |= {TASK_COLS: (1, count, ranks), TASK_ROWS: (1, ranks, base.hidden_size)}
    return shapes
