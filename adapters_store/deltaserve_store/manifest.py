"""What a listing shows of an adapter (``AdapterRecord``), and what its version folder carries (``AdapterManifest``).

A manifest describes bytes, so it is the same for every name that points to them; who gave the bytes which name, when,
and with which waivers is the record's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from deltaserve_store.added_tokens import AddedToken
from deltaserve_store.errors import StoreCorrupt

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True, slots=True)
class BaseRef:
    """The base an adapter was admitted against, and the name by which its files call that base."""

    fingerprint: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a version folder; ``sha256`` is of its bytes, lowercase hex."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """``manifest.json``: written last into a version folder, so a folder without one was never finished.

    ``version`` is the content digest (see ``digest.py``); ``bytes`` counts the adapter's files without the manifest.
    """

    version: str
    kinds: tuple[str, ...]
    file_format: str
    rank: int | None
    bytes: int
    num_parameters: int
    num_modules: int
    base_name: str | None
    base_fingerprint: str | None
    chat_template: str | None
    stop_token_ids: tuple[int, ...]
    files: tuple[StoredFile, ...]
    manifest_version: int = MANIFEST_VERSION
    num_prefix_tokens: int = 0
    invocation_token_ids: tuple[int, ...] = ()
    added_tokens: tuple[AddedToken, ...] = ()

    def to_json(self) -> str:
        data = asdict(self)
        # Manifests of other adapters stay what they were.
        for late in ("num_prefix_tokens", "invocation_token_ids", "added_tokens"):
            if not data[late]:
                del data[late]
        return json.dumps(data, sort_keys=True, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> AdapterManifest:
        """Raises ``StoreCorrupt`` when the text is not a manifest this program understands."""
        try:
            data = json.loads(text)
            if data.get("manifest_version") != MANIFEST_VERSION:
                raise StoreCorrupt(
                    f"manifest version {data.get('manifest_version')!r} found, {MANIFEST_VERSION} is understood; "
                    "open this store with the program that wrote it"
                )
            files = tuple(StoredFile(**entry) for entry in data.pop("files"))
            kinds, stops = tuple(data.pop("kinds")), tuple(data.pop("stop_token_ids"))
            invocation = tuple(data.pop("invocation_token_ids", ()))  # stores of earlier programs have none
            added = tuple(AddedToken(**entry) for entry in data.pop("added_tokens", ()))
            return cls(
                files=files,
                kinds=kinds,
                stop_token_ids=stops,
                invocation_token_ids=invocation,
                added_tokens=added,
                **data,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StoreCorrupt(f"a manifest cannot be read: {type(error).__name__}") from error


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One version under one name of one tenant. ``created_at`` is Unix time in seconds, for display.

    ``state`` is the stored state ("stored", "incompatible", "failed"); where a version lives at run time is the
    engine's to say. ``effect`` is the measured effect on probe logits (None when not measured). ``is_current`` tells
    whether the name points to this version now. ``num_prefix_tokens``: positions of the context that the adapter takes
    before a sequence's own tokens.
    """

    name: str
    version: str
    tenant: str
    kinds: tuple[str, ...]
    file_format: str
    rank: int | None
    bytes: int
    num_parameters: int
    created_at: float
    base: BaseRef
    state: str = "stored"
    state_reason: str | None = None
    effect: float | None = None
    waivers: tuple[str, ...] = ()
    source: str = ""
    chat_template: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    invocation_token_ids: tuple[int, ...] = ()
    is_current: bool = True
    num_prefix_tokens: int = 0
    added_tokens: tuple[AddedToken, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
