"""Fields that are known but not part of a schema: documented no-ops, and features refused by name.

Clients send many fields at the value that means "not used". Such a neutral value is accepted; any other value of a
feature this server does not have is an error that names the field. Nothing is accepted and ignored, except ``NO_OPS``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from deltaserve.errors import InvalidRequest

NO_OPS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""They label a request for its sender or steer a vendor's billing; no answer of ours could differ."""

_NEVER: tuple[Any, ...] = ()

REFUSED: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": _NEVER,
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": _NEVER,
    "parallel_tool_calls": (True,),
    "prediction": _NEVER,
    "prompt_cache_retention": _NEVER,
    "reasoning_effort": _NEVER,
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": _NEVER,
    "web_search_options": _NEVER,
    # extensions known from other servers
    "adapter_id": _NEVER,
    "allowed_token_ids": _NEVER,
    "bad_words": ([],),
    "chat_template": _NEVER,
    "continue_final_message": (False,),
    "documents": ([],),
    "guided_choice": _NEVER,
    "guided_grammar": _NEVER,
    "guided_json": _NEVER,
    "guided_regex": _NEVER,
    "length_penalty": (1, 1.0),
    "priority": (0,),
    "prompt_embeds": _NEVER,
    "prompt_logprobs": _NEVER,
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": _NEVER,
    "truncate_prompt_tokens": _NEVER,
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
"""Refused features and the values besides null that mean "not used"."""

_ADVICE = {
    "adapter_id": "; name the adapter in 'model', or several in 'adapters'",
    "best_of": "; use n",
    "chat_template": "; the operator registers templates",
    "prompt_logprobs": "; use echo with logprobs on /v1/completions",
}


def open_fields(data: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """``data`` without no-ops, neutral values and nulls of ``known`` fields.

    Raises InvalidRequest for a feature in use that this server does not have. Unknown fields are left for the schema.
    """
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if name in NO_OPS or (value is None and (name in known or name in REFUSED)):
            continue
        if name in REFUSED and name not in known:
            if not any(type(value) is type(neutral) and value == neutral for neutral in REFUSED[name]):
                raise unsupported(name)
            continue
        kept[name] = value
    return kept


def unsupported(name: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name} is not supported by this server{_ADVICE.get(name, '')}", param=name, code="unsupported_parameter"
    )
