"""The key under which a full KV block may be reused: everything its K and V depend on, and who may see them.

K and V of a block depend on all tokens up to its end, on the adapter parts active at each of those rows, on the base
and on the rope regime. Tenant and salt are there so that nobody can probe another's prompts by timing.

    key = SHA-256( parent key | tokens | delta key of those tokens | base fingerprint | tenant | cache salt | regime )

Every field is written as its length and its bytes, so that two different lists of fields never give the same bytes
(the same name over new bytes, a salt equal to an adapter's name, tokens that spill into the next field).
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence

from deltaserve.core import Binding

ROOT_KEY = b""
"""Parent key of a sequence's first block."""


def tagged(*fields: bytes) -> bytes:
    """Each field as its length (8 bytes, little-endian) and its bytes: injective on lists of fields."""
    return b"".join(struct.pack("<Q", len(value)) + value for value in fields)


def cache_context(base_fingerprint: str, tenant: str, cache_salt: str, kv_regime: int) -> bytes:
    """The fields that are the same for all blocks of a sequence."""
    return tagged(base_fingerprint.encode(), tenant.encode(), cache_salt.encode(), struct.pack("<q", kv_regime))


def delta_key(binding: Binding, start: int, stop: int) -> bytes:
    """Ordered (digest, canonical scales) of the parts active at positions ``start .. stop``; empty for the base alone.

    A part that begins inside the range carries its offset, a part that begins after it is absent. Scales are float32,
    as the operators apply them; minus zero is zero.
    """
    fields: list[bytes] = []
    for part in binding.parts:
        if part.start_position < stop:
            offset = max(0, part.start_position - start)
            scales = struct.pack("<ffI", part.scale_first + 0.0, part.scale_last + 0.0, offset)
            fields += [part.version.encode(), scales]
    return tagged(*fields)


def block_key(parent: bytes, token_ids: Sequence[int], delta: bytes, context: bytes) -> bytes:
    """32 bytes. ``delta`` is a ``delta_key``, ``context`` a ``cache_context``."""
    tokens = array("q", token_ids).tobytes()
    return hashlib.sha256(tagged(parent, tokens, delta, context)).digest()
