"""The header parser against mutated files: a typed refusal or an equal reading, never anything else."""

from __future__ import annotations

import json
import resource
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from deltaserve_store.errors import AdapterInvalid
from deltaserve_store.formats.safetensors_header import Header, parse_header
from deltaserve_store.formats.tensor_file import TensorFile
from deltatest.adapter_corpus import TENSORS, write_good_lora

MAX_BYTES = 1 << 30


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (write_good_lora(tmp_path_factory.mktemp("good")) / TENSORS).read_bytes()


def read(path: Path) -> dict[str, torch.Tensor]:
    with TensorFile(path, max_bytes=MAX_BYTES) as file:
        return {name: file.read(name) for name in file.header.tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64])
def test_reads_what_safetensors_wrote(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a.weight": torch.arange(24).reshape(2, 3, 4).to(dtype), "b": torch.arange(5).to(dtype)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    actual = read(tmp_path / "x.safetensors")
    assert actual.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert actual[name].dtype == dtype
        assert torch.equal(actual[name], tensor)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_never_crash(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Flips, cuts, insertions and swaps, mostly in the header. What we accept, the reference reader accepts too and
    reads alike: we are only ever stricter.
    """
    mutated = bytearray(good)
    header_end = 8 + struct.unpack("<Q", good[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, min(len(mutated), header_end + 16)))
        action = data.draw(st.sampled_from(["flip", "cut", "insert", "digit", "drop-tail"]))
        if action == "flip" and position < len(mutated):
            mutated[position] ^= 1 << data.draw(st.integers(0, 7))
        elif action == "cut":
            del mutated[position : position + data.draw(st.integers(1, 40))]
        elif action == "insert":
            mutated[position:position] = data.draw(st.binary(min_size=1, max_size=12))
        elif action == "digit" and position < len(mutated) and chr(mutated[position]).isdigit():
            mutated[position] = ord(data.draw(st.sampled_from("0123456789")))
        elif action == "drop-tail":
            del mutated[len(mutated) - data.draw(st.integers(0, 64)) :]
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(mutated)
    try:
        ours = read(path)
    except AdapterInvalid:
        return
    theirs = load_file(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(), theirs[name].nan_to_num())


_values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["F32", "I64", 2**63, -1, 4, 0]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "F64", "", 3]) | _values,
        "shape": st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**62, True]), max_size=5) | _values,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, -4, 2**64]), max_size=3) | _values,
    }
)


@settings(max_examples=200, deadline=None)
@given(header=st.dictionaries(st.sampled_from(["a", "a.b", "..", "é", "__metadata__"]), _entries | _values, max_size=4))
def test_any_json_is_read_or_refused(header: dict[str, object]) -> None:
    data = json.dumps(header).encode()
    for num_bytes in (0, 16, 64):
        try:
            result = parse_header(data, 8 + len(data) + num_bytes, "x.safetensors")
        except AdapterInvalid:
            continue
        assert isinstance(result, Header)
        assert sum(info.stop - info.start for info in result.tensors.values()) == num_bytes


def _bomb(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


BOMBS = {
    "200,000 empty tensors": b"{"
    + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(70_000))
    + b"}",
    "deep nesting": b'{"a":' + b"[" * 2_000_000,
    "many braces": b"{" * 4_000_000,
    "many quotes": b'{"' + b'\\"' * 1_900_000,
    "many commas": b'{"a":[' + b"0," * 1_900_000 + b"0]}",
    "many keys": b"{" + b",".join(b'"%x":0' % i for i in range(300_000)) + b"}",
    "one endless number": b'{"a":' + b"9" * 4_000_000 + b"}",
    "blank": b"{" + b" " * 4_000_000 + b"}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little(name: str, tmp_path: Path) -> None:
    """Under a second and a bounded heap, whatever 4 MB of header hold. (The reference reader takes 0.5 GB for some.)"""
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(_bomb(BOMBS[name]))
    before = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(AdapterInvalid):
            TensorFile(path, max_bytes=MAX_BYTES)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 << 20
    assert time.monotonic() - before < 4.0, "slow even for a traced run"


def test_a_claimed_size_allocates_nothing(tmp_path: Path) -> None:
    """A tensor of 10^15 elements is refused by arithmetic."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**15], "data_offsets": [0, 4 * 10**15]}}).encode()
    path = tmp_path / "claim.safetensors"
    path.write_bytes(_bomb(header))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterInvalid, match="bad_offsets"):
        TensorFile(path, max_bytes=MAX_BYTES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_tensors_without_items_are_read(tmp_path: Path) -> None:
    """Wherever they lie among the others."""
    written = {"a": torch.ones(0, 4), "b": torch.ones(2, 3), "c": torch.ones(5, 0, dtype=torch.uint8)}
    save_file(written, tmp_path / "some.safetensors")
    with TensorFile(tmp_path / "some.safetensors", max_bytes=MAX_BYTES) as tensors:
        for name, tensor in written.items():
            assert torch.equal(tensors.read(name), tensor)
            assert tensors.read(name).dtype == tensor.dtype


def test_stricter_than_the_reference(tmp_path: Path) -> None:
    """Names and zero sizes that the reference reader lets through; were this to change, the checks stay."""
    save_file({"../../etc/passwd": torch.ones(2)}, tmp_path / "name.safetensors")
    header = json.dumps({"a": {"dtype": "F32", "shape": [0, 1 << 40], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "empty.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    for path, code in (
        (tmp_path / "name.safetensors", "bad_tensor_name"),
        (tmp_path / "empty.safetensors", "bad_shape"),
    ):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            pass
        with pytest.raises(AdapterInvalid) as raised:
            TensorFile(path, max_bytes=MAX_BYTES)
        assert [reason.code for reason in raised.value.reasons] == [code]


def test_file_cut_after_opening(good: bytes, tmp_path: Path) -> None:
    """Truncation under an open reader is an error of ours, not a bus error."""
    path = tmp_path / "cut.safetensors"
    path.write_bytes(good)
    with TensorFile(path, max_bytes=MAX_BYTES) as file:
        name = list(file.header.tensors)[-1]
        path.write_bytes(good[:-200])
        with pytest.raises(AdapterInvalid):
            file.read(name)
        with pytest.raises(AdapterInvalid):
            list(file.chunks(name))
