"""The prefix of a sequence: positions 0 .. p - 1 hold an adapter's K and V, the sequence's own tokens follow at p.

Its blocks are ordinary blocks: filled once by a copy from the adapter's slot, cached under the adapter's delta key, and
found there by the next sequence. What a binding says of p is checked at the door; the slot's own number counts.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from deltaserve.core import Binding
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.sequence import Sequence
from deltaserve_kernels import PrefixTables


def seat_prefix(seq: Sequence, slots: Items[int], tables: PrefixTables, limits: EngineLimits) -> None:
    """Tell a sequence whose adapters are in ``slots`` which prefix it has.

    Raises ``ContextLengthExceeded`` when it does not fit after all, ``InvalidRequest`` for a strength or a composition
    that a prefix does not have.
    """
    found = [tables.num_tokens(slot) for slot in slots]
    if not any(found):
        return
    limits.check_prefixes(seq.binding, found)
    seq.num_prefix_tokens = prefix_length(seq.binding, found)
    seq.prefix_slot = slots[0] if seq.num_prefix_tokens else -1
    limits.check_length(seq.num_prompt_tokens, seq.sampling.max_tokens, seq.num_prefix_tokens)


def prefix_length(binding: Binding, lengths: Items[int]) -> int:
    """Positions that parts with prefixes of ``lengths`` take; at strength 0 none."""
    pairs = zip(binding.parts, lengths, strict=True)
    return sum(length for part, length in pairs if part.scale_first or part.scale_last)
