"""The project's own format: what the writer writes is what the reader reads, in any order, in every dtype."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaserve_store.digest import content_digest
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.deltaserve_sparse import write_sparse_adapter
from deltaserve_store.parsed import SparseDelta
from deltatest.adapter_corpus import FINGERPRINT, corpus_base

Q0 = "model.layers.0.self_attn.q_proj"
D1 = "model.layers.1.mlp.down_proj"


def delta(module: str, rows: list[int], cols: list[int], values: list[float]) -> SparseDelta:
    return SparseDelta(module, torch.tensor(rows), torch.tensor(cols), torch.tensor(values))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flat=st.lists(st.integers(0, 16 * 24 - 1), min_size=1, max_size=60, unique=True),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_round_trip(flat: list[int], dtype: torch.dtype, tmp_path: Path) -> None:
    dense = torch.zeros(16, 24, dtype=dtype)
    positions = torch.tensor(flat)
    values = torch.randn(len(flat), generator=torch.Generator().manual_seed(len(flat))).to(dtype)
    dense.view(-1)[positions] = values
    write_sparse_adapter(tmp_path, [SparseDelta(D1, positions // 24, positions % 24, values)], FINGERPRINT)
    parsed = read_adapter(tmp_path, corpus_base())
    assert (parsed.kind, parsed.file_format, parsed.num_parameters) == ("sparse", "deltaserve-sparse", len(flat))
    (read,) = parsed.deltas
    assert isinstance(read, SparseDelta)
    assert (read.rows.dtype, read.cols.dtype, read.values.dtype) == (torch.int32, torch.int32, dtype)
    actual = torch.zeros(16, 24, dtype=dtype)
    actual[read.rows.long(), read.cols.long()] = read.values
    assert torch.equal(actual, dense)
    keys = read.rows.long() * 24 + read.cols.long()
    assert bool((keys[1:] > keys[:-1]).all())


def test_facts_travel(tmp_path: Path) -> None:
    write_sparse_adapter(
        tmp_path,
        [delta(D1, [1], [2], [3.0]), delta(Q0, [0], [0], [1.0])],
        FINGERPRINT,
        base_name="tests/corpus-base",
        method="accumulated gradient",
        chat_template="chatml",
        stop_token_ids=[2, 7],
    )
    parsed = read_adapter(tmp_path, corpus_base())
    assert [item.module for item in parsed.deltas] == [Q0, D1]
    assert (parsed.base_fingerprint, parsed.base_name) == (FINGERPRINT, "tests/corpus-base")
    assert (parsed.chat_template, parsed.stop_token_ids) == ("chatml", (2, 7))


def test_writing_twice_gives_the_same_version(tmp_path: Path) -> None:
    deltas = [delta(Q0, [3, 0], [1, 2], [1.0, 2.0])]
    write_sparse_adapter(tmp_path / "one", deltas, FINGERPRINT)
    write_sparse_adapter(tmp_path / "two", [delta(Q0, [0, 3], [2, 1], [2.0, 1.0])], FINGERPRINT)
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")


def test_empty_deltas_are_left_out(tmp_path: Path) -> None:
    write_sparse_adapter(tmp_path, [delta(Q0, [], [], []), delta(D1, [0], [0], [1.0])], FINGERPRINT)
    assert json.loads((tmp_path / "adapter.json").read_text())["modules"] == {D1: 1}
    assert len(read_adapter(tmp_path, corpus_base()).deltas) == 1


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ([], "nothing to write"),
        ([delta(Q0, [], [], [])], "nothing to write"),
        ([delta(Q0, [1, 1], [2, 2], [1.0, 1.0])], "occur twice"),
        ([delta(Q0, [1], [2], [1.0, 2.0])], "of one length"),
        ([delta(Q0, [1], [2], [1.0]), delta(Q0, [0], [0], [1.0])], "two deltas"),
    ],
)
def test_writer_refuses(deltas: list[SparseDelta], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_sparse_adapter(tmp_path, deltas, FINGERPRINT)
    assert list(tmp_path.iterdir()) == []
