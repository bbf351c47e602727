"""Which adapters may be asked for in part: a rotation is applied or it is not, half of one is none."""

from __future__ import annotations

from deltaserve.core import Binding
from deltaserve.errors import InvalidRequest
from deltaserve_store.names import NameMap

WHOLE_KINDS = frozenset({"rotation"})


def whole_versions(names: NameMap) -> frozenset[str]:
    """Versions, of whatever tenant, that are served at strength 0 or 1 alone."""
    return frozenset(
        version
        for entries in names.adapters.values()
        for entry in entries.values()
        for version, record in entry.records.items()
        if not WHOLE_KINDS.isdisjoint(record.kinds)
    )


def check_strengths(binding: Binding, whole: frozenset[str]) -> None:
    """Raises ``InvalidRequest`` (``unsupported_strength``) where one of ``whole`` is asked for in part."""
    for part in binding.parts:
        scales = {part.scale_first, part.scale_last}
        if part.version in whole and scales not in ({0.0}, {1.0}):
            asked = " to ".join(f"{scale:g}" for scale in dict.fromkeys((part.scale_first, part.scale_last)))
            raise InvalidRequest(
                f"The adapter version {part.version[:12]} turns the base's activations, which is done or not; its "
                f"scale is {asked}, and 0 and 1 are allowed.",
                param="adapters",
                code="unsupported_strength",
            )
