"""The folded file: what comes back is what was written, aligned, and damage or a wrong base never loads."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from deltaserve.deltas import folded as folded_module
from deltaserve.deltas.folded import FoldedAdapter, FoldedFileInvalid, LowRankTerm, SparseTerm
from deltaserve.deltas.folded_file import ALIGNMENT
from deltaserve_store.spec import BaseSpec, LinearSpec

SPEC = BaseSpec(
    fingerprint="f" * 64,
    names=("tests/tiny",),
    model_type="llama",
    linears={name: LinearSpec(name, out_features=5, in_features=7) for name in ("a.q", "a.up")},
    vocab_size=64,
    num_layers=1,
    hidden_size=7,
)


def make(dtype: torch.dtype = torch.float32, cols: tuple[int, ...] = (0, 6, 3)) -> FoldedAdapter:
    low_rank = LowRankTerm(a=torch.randn(3, 7).to(dtype), b_t=torch.randn(3, 5).to(dtype))
    sparse = SparseTerm(
        indptr=torch.tensor([0, 1, 1, 2, 2, 3], dtype=torch.int32),
        cols=torch.tensor(cols, dtype=torch.int32),
        values=torch.randn(3).to(dtype),
    )
    return FoldedAdapter({"a.q": (low_rank,), "a.up": (low_rank, sparse)}, SPEC.fingerprint, dtype)


def tensors_of(adapter: FoldedAdapter) -> list[torch.Tensor]:
    parts = [term for name in sorted(adapter.terms) for term in adapter.terms[name]]
    return [
        tensor
        for term in parts
        for tensor in ((term.a, term.b_t) if isinstance(term, LowRankTerm) else (term.indptr, term.cols, term.values))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip_is_exact_aligned_and_without_copies(tmp_path: Path, dtype: torch.dtype, mmap: bool) -> None:
    written = make(dtype)
    written.save(tmp_path / "folded.safetensors")
    read = FoldedAdapter.load(tmp_path / "folded.safetensors", SPEC, dtype, mmap=mmap)
    assert (read.kinds, read.rank, read.nbytes) == (("lora", "sparse"), 3, written.nbytes)
    pairs = list(zip(tensors_of(written), tensors_of(read), strict=True))
    assert len(pairs) == 7
    for before, after in pairs:
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
        assert after.data_ptr() % ALIGNMENT == 0
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors_of(read)}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folded.safetensors"]


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    written = make(torch.bfloat16)
    written.save(tmp_path / "f.safetensors")
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata()["kinds"] == "lora,sparse"
        assert file.metadata()["rank"] == "3"
        term = written.terms["a.q"][0]
        assert isinstance(term, LowRankTerm)
        assert torch.equal(file.get_tensor("a.q:b_t"), term.b_t)


def test_an_adapter_without_low_rank_terms_and_an_empty_row(tmp_path: Path) -> None:
    none = SparseTerm(torch.zeros(6, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
    FoldedAdapter({"a.q": (none,)}, SPEC.fingerprint, torch.float32).save(tmp_path / "f")
    read = FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)
    assert (read.kinds, read.rank) == (("sparse",), None)


def test_flipped_bytes_are_found(tmp_path: Path) -> None:
    path = tmp_path / "f"
    make().save(path)
    good = path.read_bytes()
    (header,) = struct.unpack("<Q", good[:8])
    kept_by_padding = range(8 + good[8 : 8 + header].rstrip(b" ").__len__(), 8 + header)
    for position in range(0, len(good), 7):
        if position in kept_by_padding:
            continue
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        with pytest.raises(FoldedFileInvalid):
            FoldedAdapter.load(path, SPEC, torch.float32)


@pytest.mark.parametrize("size", [0, 7, 8, 23, 24, 200, 700])
def test_truncation_is_found(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    make().save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FoldedFileInvalid):
        FoldedAdapter.load(path, SPEC, torch.float32)


def test_another_base_dtype_or_fold_version_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save(tmp_path / "f")
    with pytest.raises(FoldedFileInvalid, match="base_fingerprint"):
        FoldedAdapter.load(tmp_path / "f", replace(SPEC, fingerprint="0" * 64), torch.float32)
    with pytest.raises(FoldedFileInvalid, match="dtype"):
        FoldedAdapter.load(tmp_path / "f", SPEC, torch.bfloat16)
    monkeypatch.setattr(folded_module, "FOLD_VERSION", folded_module.FOLD_VERSION + 1)
    with pytest.raises(FoldedFileInvalid, match="fold_version"):
        FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)


@pytest.mark.parametrize("cols", [(0, 7, 3), (0, -1, 3)])
def test_an_index_outside_the_base_does_not_load(tmp_path: Path, cols: tuple[int, ...]) -> None:
    make(cols=cols).save(tmp_path / "f")
    with pytest.raises(FoldedFileInvalid, match="column indices"):
        FoldedAdapter.load(tmp_path / "f", SPEC, torch.float32)


def test_shapes_of_another_base_do_not_load(tmp_path: Path) -> None:
    """Same fingerprint by a mistake elsewhere: the shapes still stop it."""
    make().save(tmp_path / "f")
    wider = {name: LinearSpec(name, out_features=6, in_features=7) for name in SPEC.linears}
    with pytest.raises(FoldedFileInvalid):
        FoldedAdapter.load(tmp_path / "f", replace(SPEC, linears=wider), torch.float32)
    with pytest.raises(FoldedFileInvalid, match="no linear"):
        FoldedAdapter.load(tmp_path / "f", replace(SPEC, linears={}), torch.float32)


def test_rewriting_replaces_the_file_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "f"
    make().save(path)
    kept = path.open("rb")
    before = kept.read()
    make().save(path)
    kept.seek(0)
    assert kept.read() == before
    kept.close()
    header = json.loads(path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
    assert header["__metadata__"]["format"] == "deltaserve-folded"
