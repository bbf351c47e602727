"""JSON as it goes over the wire: compact, UTF-8 as it is, one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode(data: Mapping[str, Any]) -> str:
    return _ENCODER.encode(data)


def quote(text: str | None) -> str:
    """A string, or null; what ``encode`` makes of it, without the encoder's own costs."""
    return "null" if text is None else encode_basestring(text)
