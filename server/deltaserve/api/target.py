"""What a request's ``model`` means: a binding for the engine, and what the adapter brings for text and headers."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.api.keys import Caller
from deltaserve.api.services import GenerationEngine
from deltaserve.core import BASE_BINDING, Binding, BindingPart


@dataclass(frozen=True, slots=True)
class Target:
    """``model`` is what the client wrote and reads back. ``version`` None is the base alone.

    ``fingerprint`` names the bytes that answer: the version's digest, or the base's fingerprint. ``num_prefix_tokens``:
    what the adapter takes of the context.
    """

    model: str
    name: str
    version: str | None
    fingerprint: str
    chat_template: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    num_prefix_tokens: int = 0

    @property
    def binding(self) -> Binding:
        if self.version is None:
            return BASE_BINDING
        return Binding((BindingPart(self.version, num_prefix_tokens=self.num_prefix_tokens),))

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.version is None else {"x-adapter-version": self.version}


def resolve_target(engine: GenerationEngine, caller: Caller, model: str) -> Target:
    """Reads the in-memory names only. Raises ``model_not_found`` (404), also for another tenant's adapters."""
    resolved = engine.resolve(caller.tenant, model)
    record = resolved.record
    fingerprint = resolved.version or engine.base_fingerprint
    if record is None:
        return Target(model, resolved.name, resolved.version, fingerprint)
    return Target(
        model,
        resolved.name,
        resolved.version,
        fingerprint,
        record.chat_template,
        tuple(record.stop_token_ids),
        record.num_prefix_tokens,
    )
