"""Is the adapter for this base? Our own files prove it by fingerprint, PEFT's only claim it by name."""

from __future__ import annotations

from collections.abc import Collection

from deltaserve_store.errors import BaseMismatch, Reason
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.spec import BaseSpec

BASE_WAIVER = "base"
"""Recorded when the caller vouched for the base of an adapter whose files do not name it."""


def match_base(
    adapter: ParsedAdapter, spec: BaseSpec, known_names: Collection[str], *, accept_base: bool
) -> tuple[str, ...]:
    """The waivers that the match needed: none, or ``BASE_WAIVER``.

    A fingerprint that differs is never waived: the shapes may fit, the weights are others. Raises ``BaseMismatch``.
    """
    if adapter.base_fingerprint is not None:
        if adapter.base_fingerprint != spec.fingerprint:
            found, allowed = f"fingerprint {adapter.base_fingerprint[:16]}", f"{spec.fingerprint[:16]}, the served base"
            raise BaseMismatch([Reason("base_mismatch", "base_fingerprint", found, allowed)])
        return ()
    name = (adapter.base_name or "").rstrip("/")
    if name and name in known_names:
        return ()
    if accept_base:
        return (BASE_WAIVER,)
    allowed = f"one of {', '.join(sorted(known_names))}; add a name with --base-names, or send accept_base=true"
    found = repr(adapter.base_name) if adapter.base_name else "no name"
    raise BaseMismatch([Reason("base_mismatch", "base_model_name_or_path", found, allowed)])
