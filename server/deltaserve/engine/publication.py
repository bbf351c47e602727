"""What changed between two name maps, as the engine thread needs to hear it."""

from __future__ import annotations

from deltaserve.engine.messages import Publish
from deltaserve_store.manifest import AdapterRecord
from deltaserve_store.names import NameMap


def publication(before: NameMap, after: NameMap, base_fingerprint: str) -> Publish:
    """Versions that appeared and disappeared, those of another base with the reason, and the name of each."""
    labels: dict[str, str] = {}
    incompatible: dict[str, str] = {}
    for entries in after.adapters.values():
        for name, entry in entries.items():
            for version, record in entry.records.items():
                labels[version] = name
                reason = _incompatibility(record, base_fingerprint)
                if reason is not None:
                    incompatible[version] = reason
    known, current = before.versions(), after.versions()
    return Publish(tuple(current - known), tuple(known - current), incompatible, labels)


def _incompatibility(record: AdapterRecord, base_fingerprint: str) -> str | None:
    if record.state == "incompatible":
        return record.state_reason or "it was made for another base"
    if record.base.fingerprint != base_fingerprint:
        return f"it was admitted for the base {record.base.fingerprint[:12]}, this one is {base_fingerprint[:12]}"
    return None
