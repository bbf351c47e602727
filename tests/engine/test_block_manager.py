"""Blocks and the keys under which they may be shared."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaserve.core import Binding, BindingPart, SamplingParams
from deltaserve.engine.block_key import ROOT_KEY, block_key, cache_context, delta_key, tagged
from deltaserve.engine.block_manager import BlockManager
from deltaserve.engine.sequence import Sequence
from deltatest.engine_fakes import FINGERPRINT, make_rig, request


def untagged(data: bytes) -> Iterator[bytes]:
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[8 : 8 + length]
        data = data[8 + length :]


def seq(tokens: list[int], *versions: str, seq_id: int = 0, **fields: object) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        request_id="r",
        index=0,
        token_ids=list(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(),
        binding=Binding(tuple(BindingPart(version) for version in versions)),
        versions=versions,
        priority=(0.0, seq_id),
        arrival_seconds=0.0,
        stop_token_ids=frozenset(),
        **fields,  # type: ignore[arg-type]
    )


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_tagging_can_be_undone_so_it_is_injective(fields: list[bytes]) -> None:
    assert list(untagged(tagged(*fields))) == fields


parts = st.builds(
    BindingPart,
    version=st.sampled_from(["a", "b", "ab", "salt"]),
    scale_first=st.sampled_from([0.0, -0.0, 1.0, 0.5]),
    scale_last=st.sampled_from([1.0, 0.5]),
    start_position=st.sampled_from([0, 5, 16, 20, 32]),
)
contexts = st.tuples(
    st.sampled_from(["base", "bas"]),
    st.sampled_from(["", "t", "a"]),
    st.sampled_from(["", "t", "a"]),
    st.integers(0, 1),
)
blocks = st.tuples(
    st.sampled_from([ROOT_KEY, b"p" * 32]),
    st.lists(st.integers(0, 3), min_size=16, max_size=16).map(tuple),
    st.lists(parts, max_size=2).map(tuple),
    contexts,
)


def seen_by_rows(binding: Binding) -> tuple[object, ...]:
    """What the rows at positions 16..31 are computed with, spelled out row by row."""
    return tuple(
        tuple((p.version, p.scale_first, p.scale_last) for p in binding.parts if p.start_position <= position)
        for position in range(16, 32)
    )


@given(blocks, blocks)
def test_keys_are_equal_exactly_when_what_was_computed_is(first: tuple, second: tuple) -> None:
    def key(block: tuple) -> bytes:
        parent, tokens, binding_parts, context = block
        return block_key(parent, tokens, delta_key(Binding(binding_parts), 16, 32), cache_context(*context))

    def meaning(block: tuple) -> object:
        return block[0], block[1], seen_by_rows(Binding(block[2])), block[3]

    assert (key(first) == key(second)) == (meaning(first) == meaning(second))


def test_each_field_counts() -> None:
    rig = make_rig(contents={"poet": 1.0, "poet2": 2.0})
    prompt = list(range(40))

    def cached(**fields: object) -> int:
        versions = fields.pop("versions", ())
        name = str(len(rig.runner.kv)) + str(rig.runner.num_steps)
        rig.engine.add(request(name, prompt, *versions, max_tokens=1, **fields), rig.engine.clock())  # type: ignore
        outputs = []
        while rig.engine.open_ids:
            outputs += rig.engine.step().outputs
            rig.engine.check_integrity()
        return outputs[0].num_cached_tokens

    assert cached() == 0
    assert cached() == 32
    assert cached(versions=("poet",)) == 0  # the adapter changes K and V
    assert cached(versions=("poet",)) == 32
    assert cached(versions=("poet2",)) == 0  # the same name over new bytes is another version
    assert cached(cache_salt="poet") == 0  # a salt equal to an adapter's name is not that adapter
    assert cached(tenant="poet") == 0
    assert cached(tenant="other", cache_salt="x") == 0
    assert cached(tenant="otherx") == 0  # nor do neighbouring fields run into each other
    assert cached(cache_salt="poet") == 32
    half = Binding((BindingPart("poet", 0.5, 0.5),))
    assert cached(binding=half) == 0
    assert cached(binding=half) == 32
    late = Binding((BindingPart("poet", start_position=16),))
    assert cached(binding=late) == 16  # before its start an activated adapter has changed nothing
    assert cached(binding=Binding((BindingPart("poet", start_position=40),))) == 32


def test_other_bases_and_regimes_share_nothing() -> None:
    def first_key(fingerprint: str, regime: int) -> bytes:
        return block_key(ROOT_KEY, range(16), b"", cache_context(fingerprint, "", "", regime))

    assert len({first_key("a", 0), first_key("b", 0), first_key("a", 1)}) == 3


def test_a_block_is_shared_while_held_and_revived_while_free() -> None:
    blocks = BlockManager(8, FINGERPRINT)
    first = seq(list(range(40)))
    assert blocks.begin(first)
    first.num_computed_tokens = 40
    blocks.commit(first)
    second = seq(list(range(40)), seq_id=1)
    assert blocks.begin(second)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]
    assert second.num_computed_tokens == 32
    blocks.check_integrity([first, second])
    assert blocks.num_used == 4
    blocks.release(first)
    blocks.release(second)
    assert blocks.num_free == 8
    third = seq(list(range(40)), seq_id=2)
    assert blocks.begin(third)
    assert third.num_computed_tokens == 32
    blocks.check_integrity([third])


def test_blocks_are_handed_out_oldest_free_first_and_tails_before_heads() -> None:
    blocks = BlockManager(4, FINGERPRINT)
    old = seq(list(range(33)))
    assert blocks.begin(old)
    old.num_computed_tokens = 33
    blocks.commit(old)
    head, tail = old.block_table[0], old.block_table[1]
    blocks.release(old)
    blocks.begin(seq([7], seq_id=1))  # takes the block that was never used
    newcomer = seq([9] * 20, seq_id=2)
    assert blocks.begin(newcomer)
    assert tail in newcomer.block_table
    assert head not in newcomer.block_table
    again = seq(list(range(33)), seq_id=3)
    assert blocks._cached_prefix(again) == [head]


def test_begin_changes_nothing_when_there_is_no_room() -> None:
    blocks = BlockManager(4, FINGERPRINT)
    first = seq(list(range(33)))
    assert blocks.begin(first)
    big = seq([1] * 40, seq_id=1)
    assert not blocks.begin(big)
    assert big.block_table == []
    assert not blocks.begin(seq([1], seq_id=2), reserve=1)
    blocks.check_integrity([first])


def test_the_books_are_really_checked() -> None:
    blocks = BlockManager(4, FINGERPRINT)
    held = seq(list(range(20)))
    blocks.begin(held)
    blocks.check_integrity([held])
    with pytest.raises(RuntimeError, match="reference counts"):
        blocks.check_integrity([])
    blocks._free[held.block_table[0]] = None
    with pytest.raises(RuntimeError, match="free list"):
        blocks.check_integrity([held])


@pytest.mark.parametrize("others", [0, 1])
def test_several_sequences_get_their_blocks_all_or_none(others: int) -> None:
    """Cached blocks that two of them share are revived once; what one finds is not handed to another as new."""
    blocks = BlockManager(8, FINGERPRINT)
    tokens = list(range(40))
    for versions in (("a",), ("b",)):  # two full blocks of each stay cached
        warm = seq(tokens, *versions)
        assert blocks.begin(warm)
        warm.num_computed_tokens = 40
        blocks.commit(warm)
        blocks.release(warm)
    rows = [seq(tokens, version, seq_id=i) for i, version in enumerate(("a", "a", "b"))]
    held = seq([1] * 16 * others, seq_id=9)
    assert blocks.begin(held, reserve=7)
    before = list(blocks._free)
    if others:  # four are revived and three are new
        assert blocks.begin(*rows)
    else:
        assert not blocks.begin(*rows, reserve=2)
        assert list(blocks._free) == before
        assert not any(row.block_table for row in rows)
        assert blocks.begin(*rows, reserve=1)
    assert [row.num_computed_tokens for row in rows] == [32, 32, 32]
    assert rows[0].block_table[:2] == rows[1].block_table[:2]
    assert len({block for row in rows for block in row.block_table}) == 7
    blocks.check_integrity([*rows, held])
    one, other = seq(tokens[::-1], "c", seq_id=3), seq(tokens[:16], "a", seq_id=4)
    assert not blocks.begin(one, other)
    blocks.check_integrity([*rows, held])
