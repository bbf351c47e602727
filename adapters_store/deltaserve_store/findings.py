"""Collects what is wrong with an adapter, so that a refusal names everything at once."""

from __future__ import annotations

from deltaserve_store.errors import AdapterInvalid, BaseMismatch, Reason, quote
from deltaserve_store.reason_codes import REASON_CODES

MAX_FINDINGS = 1000
"""Longest list of reasons a refusal carries; one more entry tells how many were left out."""


class Findings:
    """Ordered reasons, each once."""

    def __init__(self) -> None:
        self._reasons: dict[Reason, None] = {}
        self._num_left_out = 0

    def add(self, code: str, where: str, found: object, allowed: str) -> None:
        """``found`` is quoted: printable and short. ``code`` must be one of ``REASON_CODES``."""
        if code not in REASON_CODES:
            raise KeyError(code)
        reason = Reason(code, quote(where), quote(found), allowed)
        if reason in self._reasons:
            return
        if len(self._reasons) >= MAX_FINDINGS:
            self._num_left_out += 1
            return
        self._reasons[reason] = None

    def extend(self, error: AdapterInvalid) -> None:
        for reason in error.reasons:
            self.add(reason.code, reason.where, reason.found, reason.allowed)

    def __bool__(self) -> bool:
        return bool(self._reasons)

    @property
    def reasons(self) -> tuple[Reason, ...]:
        if not self._num_left_out:
            return tuple(self._reasons)
        more = Reason("too_many_findings", "adapter", f"{self._num_left_out} more", f"{MAX_FINDINGS} are listed")
        return (*self._reasons, more)

    def raise_if_any(self) -> None:
        """Raises ``BaseMismatch`` when that is among the reasons, else ``AdapterInvalid``; nothing when all is well."""
        if not self._reasons:
            return
        if any(reason.code == "base_mismatch" for reason in self._reasons):
            raise BaseMismatch(self.reasons)
        raise AdapterInvalid(self.reasons)


def refuse(code: str, where: str, found: object, allowed: str) -> AdapterInvalid:
    """The error for one finding after which nothing further can be said."""
    findings = Findings()
    findings.add(code, where, found, allowed)
    return AdapterInvalid(findings.reasons)
