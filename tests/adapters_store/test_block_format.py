"""The project's format of row and column blocks: what is written is read, and nothing damaged is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaserve_store.block_deltas import BlockDelta
from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.deltaserve_blocks import write_block_adapter
from deltatest.adapter_corpus import FINGERPRINT, Q0, BadAdapter, corpus_base
from deltatest.block_corpus import BLOCK_CORPUS, DOWN1, V0, ints, write_good_blocks


def test_what_is_written_is_read(tmp_path: Path) -> None:
    parsed = read_adapter(write_good_blocks(tmp_path / "a"), corpus_base())
    assert (parsed.kind, parsed.file_format, parsed.num_parameters) == ("block", "deltaserve-blocks", 48 + 32 + 6)
    found = {delta.module: delta for delta in parsed.deltas if isinstance(delta, BlockDelta)}
    assert list(found) == [Q0, V0, DOWN1]
    assert found[Q0].in_cols is None
    assert found[DOWN1].out_rows is None
    both = found[V0]
    assert both.out_rows is not None
    assert both.in_cols is not None
    assert torch.equal(both.out_rows, ints(2, 7))
    assert torch.equal(both.in_cols, ints(0, 4, 5))
    assert torch.equal(both.values, torch.ones(2, 3))


def test_what_cannot_be_said_is_not_written(tmp_path: Path) -> None:
    whole, block = BlockDelta(Q0, None, None, torch.ones(16, 16)), BlockDelta(Q0, ints(1), None, torch.ones(1, 16))
    for deltas in ((whole,), (block, block), ()):
        with pytest.raises(ValueError):
            write_block_adapter(tmp_path / "a", deltas, FINGERPRINT)


@pytest.mark.parametrize("case", BLOCK_CORPUS, ids=lambda case: case.name)
def test_refused_with_its_reasons(case: BadAdapter, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid) as raised:
        read_adapter(case.write(tmp_path / "adapter"), corpus_base())
    found = {(reason.code, reason.where) for reason in raised.value.reasons}
    assert found == set(case.reasons) if case.is_exact else found >= set(case.reasons)
