"""File formats of adapters. ``read_adapter`` is the one way in: it tells the format and holds it to its rules."""

from __future__ import annotations

from deltaserve_store.formats.read import read_adapter

__all__ = ["read_adapter"]
