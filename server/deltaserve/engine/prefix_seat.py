"""The prefixes of a sequence: the virtual tokens of its adapters, in the order of the parts, before its own tokens.

Their blocks are ordinary blocks: filled once, cached under the keys of the whole binding, and found there by the next
sequence. Given keys and values are copied wherever they stand. Those that embeddings leave behind are copied too, where
nothing has a part in them: at position 0, and with no other adapter's terms on their rows; else the sequence's parts
compute them (``prefix_fill``). What a binding says of lengths is checked at the door; the slots' own numbers count.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from deltaserve.core import Binding
from deltaserve.engine.batch import PrefixPart
from deltaserve.engine.limits import EngineLimits
from deltaserve.engine.sequence import Sequence
from deltaserve_kernels import PrefixTables


def seat_prefixes(seq: Sequence, slots: Items[int], tables: PrefixTables, limits: EngineLimits) -> None:
    """Tell a sequence whose adapters are in ``slots`` which prefixes it has.

    Raises ``ContextLengthExceeded`` when they do not fit after all, ``InvalidRequest`` for a strength that no prefix
    has.
    """
    found = [tables.num_tokens(slot) for slot in slots]
    if not any(found):
        return
    limits.check_prefixes(seq.binding, found)
    seq.prefixes = arrange(seq.binding, slots, tables)
    seq.num_prefix_tokens = sum(part.num_tokens for part in seq.prefixes)
    limits.check_length(seq.num_prompt_tokens, seq.sampling.max_tokens, seq.num_prefix_tokens)


def arrange(binding: Binding, slots: Items[int], tables: PrefixTables) -> tuple[PrefixPart, ...]:
    """The prefixes of a binding one behind the other; a part at strength 0 has none."""
    active = [
        (slot, part.start_position)
        for slot, part in zip(slots, binding.parts, strict=True)
        if part.scale_first or part.scale_last
    ]
    first_changed = min((start for slot, start in active if not tables.has_slot(slot)), default=None)
    prefixes: list[PrefixPart] = []
    start = 0
    for slot, _ in active:
        count = tables.num_tokens(slot)
        if not count:
            continue
        is_touched = start > 0 or (first_changed is not None and first_changed < count)
        is_run = is_touched and tables.embeddings(slot) is not None
        prefixes.append(PrefixPart(slot, start, count, is_run))
        start += count
    return tuple(prefixes)
