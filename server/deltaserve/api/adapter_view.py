"""The JSON object that every listing shows of a version, over HTTP and on the command line. No web framework here."""

from __future__ import annotations

from typing import Any

from deltaserve.core import AdapterState, AdapterStatus
from deltaserve_store.manifest import AdapterRecord


def adapter_view(record: AdapterRecord, live: AdapterStatus | None, base: str | None) -> dict[str, Any]:
    """``live`` is where the version is now, None without an engine; ``base`` the served base's name, None likewise.

    Waivers always show; a server path never does.
    """
    state: str = live.state if live is not None else AdapterState(record.state)
    return {
        "id": record.name,
        "object": "adapter",
        "version": record.version,
        "kinds": list(record.kinds),
        "format": record.file_format,
        "rank": record.rank,
        "bytes": record.bytes,
        "parameters": record.num_parameters,
        "prefix_tokens": record.num_prefix_tokens,
        "state": state,
        "state_reason": (live.reason if live is not None else None) or record.state_reason,
        "effect": record.effect,
        "base": base,
        "base_fingerprint": record.base.fingerprint,
        "base_name_in_files": record.base.name,
        "waivers": list(record.waivers),
        "chat_template": record.chat_template,
        "invocation_token_ids": list(record.invocation_token_ids),
        "added_tokens": {token.content: token.id for token in record.added_tokens},
        "created_at": int(record.created_at),
    }
