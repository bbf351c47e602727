"""What a request's ``model`` and ``adapters`` mean: a binding for the engine, and what the adapters bring for text and
headers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltaserve.api.activation import start_of
from deltaserve.api.keys import Caller
from deltaserve.api.schemas.composition import AdapterChoice
from deltaserve.api.services import GenerationEngine
from deltaserve.core import BASE_BINDING, Binding, BindingPart, Ensemble
from deltaserve.errors import InvalidRequest, ModelNotFound
from deltaserve_store.added_tokens import AddedToken
from deltaserve_store.errors import NotFound
from deltaserve_store.manifest import AdapterRecord
from deltaserve_store.names import Resolved

NEVER = (1 << 31) - 1
"""A position that no sequence reaches."""


@dataclass(frozen=True, slots=True)
class Target:
    """``model`` is what the client wrote and reads back; ``names`` are the adapters' own, none for the base alone.

    ``fingerprint`` names the bytes that answer: the version's digest, the base's fingerprint, or a digest of the
    versions and scales that are composed. ``adapters`` is what the answer to a composition tells of its parts.
    ``chat_templates`` are those that the adapters name. ``invocations``: for each part the tokens from which on it
    acts, empty where it always does. ``added_tokens``: those that the base's tokenizer lacks.
    """

    model: str
    fingerprint: str
    names: tuple[str, ...] = ()
    binding: Binding = BASE_BINDING
    adapters: tuple[Mapping[str, Any], ...] = ()
    chat_templates: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    added_tokens: tuple[AddedToken, ...] = ()
    invocations: tuple[tuple[int, ...], ...] = ()

    @property
    def versions(self) -> tuple[str, ...]:
        return self.binding.versions

    @property
    def num_rows(self) -> int:
        """Rows that a choice takes in each step."""
        return 1

    @property
    def num_prefix_tokens(self) -> int:
        """Positions that are not left for the prompt and the answer."""
        return self.binding.num_prefix_tokens

    @property
    def headers(self) -> dict[str, str]:
        return {"x-adapter-version": ",".join(self.versions)} if self.versions else {}

    @property
    def told(self) -> dict[str, Any]:
        """What the answer tells beside model and fingerprint."""
        return {"adapters": self.adapters} if self.adapters else {}

    @property
    def log_fields(self) -> dict[str, Any]:
        """The name and version of an adapter; of a composition all of them, joined."""
        return {"model": "+".join(self.names) or self.model, "version": ",".join(self.versions) or None}

    def ensemble_for(self, prompt_ids: Sequence[int]) -> Ensemble | None:
        """The members that answer this prompt together, each with its binding; None: one model answers."""
        return None

    def binding_for(self, prompt_ids: Sequence[int]) -> Binding:
        """The parts, each from its invocation in this prompt on; positions count from the first virtual token.

        An adapter that is not invoked leaves the base alone; a part of a composition keeps its place, as errors count.
        """
        if not any(self.invocations):
            return self.binding
        calls = [start_of(prompt_ids, invocation) if invocation else None for invocation in self.invocations]
        if len(calls) == 1 and calls[0] is None:
            return BASE_BINDING
        skipped = self.binding.num_prefix_tokens
        starts = [NEVER if at is None else skipped + at for at in calls]
        each = zip(self.binding.parts, self.invocations, starts, strict=True)
        return Binding(tuple(replace(part, start_position=at) if called else part for part, called, at in each))

    @property
    def chat_template(self) -> str | None:
        """Raises ``InvalidRequest`` when adapters name different ones: a conversation is rendered once."""
        if len(self.chat_templates) > 1:
            raise InvalidRequest(
                f"the adapters want different chat templates ({', '.join(self.chat_templates)}); compose adapters of "
                "one template, or render the prompt yourself and send it to /v1/completions",
                param="adapters",
                code="composition_refused",
            )
        return self.chat_templates[0] if self.chat_templates else None


def resolve_target(
    engine: GenerationEngine, caller: Caller, model: str, adapters: Sequence[AdapterChoice] = ()
) -> Target:
    """Reads the in-memory names only. Raises ``model_not_found`` (404), also for another tenant's adapters, and
    ``InvalidRequest`` for what cannot be composed as it is written."""
    resolved = engine.resolve(caller.tenant, model)
    if not adapters:
        binding = BASE_BINDING if resolved.is_base else Binding((_part(resolved),))
        return _target(model, resolved.version or engine.base_fingerprint, binding, [resolved])
    if not resolved.is_base:
        raise InvalidRequest(
            f"model names the adapter {resolved.name}; beside adapters it names the base, and adapters lists all of "
            "those that are composed",
            param="model",
        )
    engine.limits.check_num_parts(len(adapters))  # before the names: who lists too many hears of that, not of one
    found = [_resolve(engine, caller, index, choice) for index, choice in enumerate(adapters)]
    parts = tuple(_part(each, choice.scale) for each, choice in zip(found, adapters, strict=True))
    _refuse_repeats(parts, adapters)
    told = tuple(
        {"id": choice.id, "version": part.version, "scale": _written(choice.scale)}
        for part, choice in zip(parts, adapters, strict=True)
    )
    return _target(model, _digest(parts), Binding(parts), found, told)


def _part(resolved: Resolved, scale: tuple[float, float] = (1.0, 1.0)) -> BindingPart:
    version, record = str(resolved.version), resolved.record
    if record is None:
        return BindingPart(version, *scale)
    last = record.added_tokens[-1].id + 1 if record.added_tokens else 0
    return BindingPart(version, *scale, num_prefix_tokens=record.num_prefix_tokens, num_token_ids=last)


def _target(
    model: str,
    fingerprint: str,
    binding: Binding,
    found: Sequence[Resolved],
    told: tuple[Mapping[str, Any], ...] = (),
) -> Target:
    records = [each.record for each in found if each.record is not None]
    added = _added_tokens(records, binding)
    ends = tuple(token.id for token in added if token.is_end)
    return Target(
        model,
        fingerprint,
        names=tuple(each.name for each in found if not each.is_base),
        binding=binding,
        adapters=told,
        chat_templates=tuple(dict.fromkeys(r.chat_template for r in records if r.chat_template is not None)),
        stop_token_ids=tuple(dict.fromkeys((*(i for r in records for i in r.stop_token_ids), *ends))),
        added_tokens=added,
        invocations=tuple(record.invocation_token_ids for record in records),
    )


def _added_tokens(records: Sequence[AdapterRecord], binding: Binding) -> tuple[AddedToken, ...]:
    """Those of the one part that adds tokens. It does so or not: at strength 0 the base's tokenizer is in use."""
    found: tuple[AddedToken, ...] = ()
    for index, (record, part) in enumerate(zip(records, binding.parts, strict=True)):
        if not record.added_tokens:
            continue
        scales = {part.scale_first, part.scale_last}
        if scales not in ({0.0}, {1.0}):
            raise InvalidRequest(
                f"adapters[{index}] adds {len(record.added_tokens)} tokens to the base's; its scale is 0 or 1",
                param=f"adapters[{index}].scale",
                code="composition_refused",
            )
        if scales == {1.0} and found:
            raise InvalidRequest(
                f"adapters[{index}] adds tokens to the base's, and so does an adapter before it; compose one such",
                param=f"adapters[{index}].id",
                code="composition_refused",
            )
        found = record.added_tokens if scales == {1.0} else found
    return found


def _resolve(engine: GenerationEngine, caller: Caller, index: int, choice: AdapterChoice) -> Resolved:
    param = f"adapters[{index}].id"
    try:
        resolved = engine.resolve(caller.tenant, choice.id)
    except NotFound as error:
        raise ModelNotFound(f"{param}: {error}", param=param) from error
    if resolved.is_base:
        raise InvalidRequest(f"{param} names the base, which is always there; list adapters alone", param=param)
    return resolved


def _refuse_repeats(parts: Sequence[BindingPart], adapters: Sequence[AdapterChoice]) -> None:
    first: dict[str, int] = {}
    for index, part in enumerate(parts):
        other = first.setdefault(part.version, index)
        if other != index:
            raise InvalidRequest(
                f"adapters[{other}] and adapters[{index}] ({adapters[other].id} and {adapters[index].id}) are the same "
                f"version {part.version[:12]}; list it once, with the sum of the scales",
                param=f"adapters[{index}].id",
                code="composition_refused",
            )


def _digest(parts: Sequence[BindingPart]) -> str:
    """Of an adapter at full strength its own; else 64 hex digits over versions and scales, in order."""
    if len(parts) == 1 and parts[0].scale_first == parts[0].scale_last == 1.0:
        return parts[0].version
    digest = hashlib.sha256(b"composition")
    for part in parts:
        digest.update(part.version.encode() + struct.pack("<dd", part.scale_first, part.scale_last))
    return digest.hexdigest()


def _written(scale: tuple[float, float]) -> float | list[float]:
    return scale[0] if scale[0] == scale[1] else list(scale)
