"""What a request's ``ensemble`` means: a target for each member, and one for all of them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deltaserve.api.keys import Caller
from deltaserve.api.schemas.ensemble import EnsembleChoice, MemberChoice
from deltaserve.api.schemas.sampling import GenerationFields
from deltaserve.api.services import GenerationEngine
from deltaserve.api.target import Target, resolve_target
from deltaserve.core import Ensemble, Member, Mix
from deltaserve.errors import DeltaserveError, EnsembleRefused, InvalidRequest, inside
from deltaserve_store.errors import StoreError


@dataclass(frozen=True, slots=True)
class EnsembleTarget(Target):
    """``names`` tells the models apart that answer; ``members`` are a target and a weight each."""

    members: tuple[tuple[Target, float], ...] = ()
    mix: Mix = Mix.LOGITS

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(version for target, _ in self.members for version in target.versions))

    @property
    def num_rows(self) -> int:
        return len(self.members)

    @property
    def num_prefix_tokens(self) -> int:
        return max(target.num_prefix_tokens for target, _ in self.members)

    @property
    def told(self) -> dict[str, Any]:
        members = [{**_told(target), "weight": weight} for target, weight in self.members]
        return {"ensemble": {"mix": self.mix.value, "members": members}}

    @property
    def log_fields(self) -> dict[str, Any]:
        names = [str(target.log_fields["model"]) for target, _ in self.members]
        return {"model": "|".join(names), "version": ",".join(self.versions) or None}

    def ensemble_for(self, prompt_ids: Sequence[int]) -> Ensemble:
        members = tuple(Member(target.binding_for(prompt_ids), weight) for target, weight in self.members)
        return Ensemble(members, self.mix)

    @property
    def chat_template(self) -> str | None:
        """Raises ``EnsembleRefused``: one conversation is rendered, and every member reads it."""
        if len(self.chat_templates) > 1:
            raise EnsembleRefused(
                f"the members want different chat templates ({', '.join(self.chat_templates)}); name members of one "
                "template, or render the prompt yourself and send it to /v1/completions",
                param="ensemble.members",
            )
        return self.chat_templates[0] if self.chat_templates else None


def target_of(engine: GenerationEngine, caller: Caller, fields: GenerationFields) -> Target:
    """What answers the request. Raises as ``resolve_target`` does."""
    if fields.ensemble is None:
        return resolve_target(engine, caller, fields.model, fields.adapters)
    return _resolve_ensemble(engine, caller, fields, fields.ensemble)


def _resolve_ensemble(
    engine: GenerationEngine, caller: Caller, fields: GenerationFields, choice: EnsembleChoice
) -> EnsembleTarget:
    if not engine.resolve(caller.tenant, fields.model).is_base:
        raise InvalidRequest(
            "model names an adapter; beside ensemble it names the base, and members lists all that answer",
            param="model",
        )
    if fields.adapters:
        raise InvalidRequest("adapters stand beside ensemble; each member lists its own adapters", param="adapters")
    engine.limits.check_num_members(len(choice.members))
    members = []
    for index, member in enumerate(choice.members):
        with _told_of(f"ensemble.members[{index}]"):
            target = _resolve_member(engine, caller, member, fields.model)
        members.append((target, 1.0 / len(choice.members) if member.weight is None else member.weight))
    targets = [target for target, _ in members]
    if any(target.added_tokens != targets[0].added_tokens for target in targets):
        raise EnsembleRefused(
            "the members add different tokens to the base's, so they do not read and write the same; name members with "
            "the same added tokens",
            param="ensemble.members",
        )
    mix = Mix(choice.mix)
    return EnsembleTarget(
        fields.model,
        _digest(members, mix),
        names=tuple(dict.fromkeys(name for target in targets for name in target.names)),
        chat_templates=tuple(dict.fromkeys(name for target in targets for name in target.chat_templates)),
        stop_token_ids=tuple(dict.fromkeys(token_id for target in targets for token_id in target.stop_token_ids)),
        added_tokens=targets[0].added_tokens,
        members=tuple(members),
        mix=mix,
    )


def _resolve_member(engine: GenerationEngine, caller: Caller, member: MemberChoice, base: str) -> Target:
    return resolve_target(engine, caller, base if member.model is None else member.model, member.adapters)


@contextmanager
def _told_of(where: str) -> Iterator[None]:
    """Errors name the field of the member."""
    try:
        yield
    except (DeltaserveError, StoreError) as error:
        error.param = where if error.param is None else f"{where}.{error.param}"
        if isinstance(error, DeltaserveError):
            inside(error, where)
        raise


def _told(target: Target) -> Mapping[str, Any]:
    """A composition by its adapters, anything else by its name and version."""
    return target.told or {"model": target.model, "version": target.versions[0] if target.versions else None}


def _digest(members: Sequence[tuple[Target, float]], mix: Mix) -> str:
    """Of one member that counts fully its own; else 64 hex digits over what answers, its weights, and the mix."""
    if len(members) == 1 and members[0][1] == 1.0:
        return members[0][0].fingerprint
    digest = hashlib.sha256(b"ensemble" + mix.value.encode())
    for target, weight in members:
        digest.update(target.fingerprint.encode() + struct.pack("<d", weight))
    return digest.hexdigest()
