"""Prefixes by slot: copied whole, from any block on, and refused where they do not fit."""

from __future__ import annotations

import pytest
import torch

from deltaserve_kernels import OutOfRange, PrefixEntry, PrefixTables, ShapeMismatch

PAGE = (2, 2, 1, 16, 3)


def entry(num_tokens: int, *, regimes: int = 1, seed: int = 0) -> PrefixEntry:
    blocks = -(-num_tokens // 16)
    return PrefixEntry(torch.randn(regimes, blocks, *PAGE, generator=torch.Generator().manual_seed(seed)), num_tokens)


def test_pages_land_in_the_blocks_of_the_table_and_nowhere_else() -> None:
    tables, pool = PrefixTables(3), torch.full((6, *PAGE), 7.0)
    assert tables.is_empty
    assert tables.num_tokens(2) == 0
    given = entry(37)
    tables.set(2, given)
    assert (tables.is_empty, tables.num_tokens(2), tables.has_slot(2), tables.has_slot(1)) == (False, 37, True, False)
    tables.copy(2, pool, [4, 0, 5, 1])
    assert torch.equal(pool[[4, 0, 5]], given.pages[0])
    assert (pool[[1, 2, 3]] == 7).all()
    tables.clear(2)
    assert tables.is_empty


def test_a_shared_head_is_left_alone() -> None:
    """Blocks before ``first`` may be read by others at this very step."""
    tables, pool = PrefixTables(1), torch.full((6, *PAGE), 7.0)
    given = entry(33)
    tables.set(0, given)
    tables.copy(0, pool, [4, 0, 5], first=2)
    assert torch.equal(pool[5], given.pages[0, 2])
    assert (pool[:5] == 7).all()


def test_one_behind_another_begins_inside_a_block() -> None:
    """At any position, from any block on: nothing before and nothing behind is touched."""
    given = entry(37)
    tables = PrefixTables(1)
    tables.set(0, given)
    flat = given.pages[0].movedim(-2, 1).flatten(0, 1)[:37]  # [positions, *rest]
    table = [4, 0, 5, 1, 3]
    for start in (0, 5, 16, 27):
        for first in range(5):
            pool = torch.full((6, *PAGE), 7.0)
            tables.copy(0, pool, table, first, 0, start)
            found = pool[table].movedim(-2, 1).flatten(0, 1)
            begin, stop = max(start, 16 * first), start + 37
            assert (found[:begin] == 7).all()
            assert (pool[2] == 7).all()
            if begin < stop:
                assert torch.equal(found[begin:stop], flat[begin - start :])
            if start % 16:
                assert (found[max(begin, stop) :] == 7).all()
    with pytest.raises(ShapeMismatch, match="from position 44 on and 5 blocks"):
        tables.copy(0, torch.zeros(6, *PAGE), table, start=44)


def test_embeddings_are_kept_beside_the_pages() -> None:
    tables, embeddings = PrefixTables(2), torch.randn(20, 6)
    with_them = entry(20)._replace(embeddings=embeddings)
    tables.set(0, with_them)
    tables.set(1, entry(20))
    assert tables.embeddings(0) is embeddings
    assert tables.embeddings(1) is None
    assert with_them.nbytes == entry(20).nbytes + 20 * 6 * 4
    moved = with_them.to(torch.device("meta"))
    assert moved.embeddings is not None
    assert moved.embeddings.is_meta
    for wrong in (embeddings[:19], embeddings[0]):
        with pytest.raises(ShapeMismatch, match="positions of embeddings"):
            tables.set(1, entry(20)._replace(embeddings=wrong))


def test_each_regime_has_its_pages_where_there_are_several() -> None:
    tables, pool = PrefixTables(2), torch.zeros(2, *PAGE)
    one, two = entry(5), entry(5, regimes=2, seed=1)
    tables.set(0, one)
    tables.set(1, two)
    for regime in (0, 1):
        tables.copy(0, pool, [0], regime=regime)
        tables.copy(1, pool, [1], regime=regime)
        assert torch.equal(pool[0], one.pages[0, 0])
        assert torch.equal(pool[1], two.pages[regime, 0])


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    tables, pool = PrefixTables(1), torch.full((6, *PAGE), 7.0)
    good = entry(20)
    for slot in (-1, 1):
        with pytest.raises(OutOfRange, match=r"slot -?1 is outside"):
            tables.set(slot, good)
    for count in (0, 16, 33):
        with pytest.raises(ShapeMismatch, match="positions in pages"):
            tables.set(0, PrefixEntry(good.pages, count))
    assert tables.is_empty
    tables.set(0, good)
    with pytest.raises(ShapeMismatch, match="1 blocks"):
        tables.copy(0, pool, [3])
    with pytest.raises(ShapeMismatch, match="the pool is"):
        tables.copy(0, torch.zeros(6, *PAGE[:-1], 4), [3, 4])
    assert (pool == 7).all()
