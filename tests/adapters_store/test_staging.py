"""Uploads: flat allow-listed names, caps while bytes arrive, archives that can do no harm."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltaserve_store.errors import AdapterInvalid, StoreFull, UploadTooLarge
from deltaserve_store.formats import read_adapter
from deltaserve_store.staging import StagedUpload, Staging
from deltaserve_store.store import AdapterStore
from deltaserve_store.upload_limits import UploadLimits
from deltatest.adapter_corpus import CONFIG, PICKLE, TENSORS, corpus_base, write_good_lora


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def upload(store: AdapterStore) -> Iterator[StagedUpload]:
    with Staging(store).open() as staged:
        yield staged


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_good_lora(tmp_path_factory.mktemp("good"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_zip(path: Path, entries: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, entries: dict[str, bytes], mode: str = "w", format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=format) as archive:  # type: ignore[call-overload]
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5  # type: ignore[assignment]  # a fraction makes a pax header
            archive.addfile(info, io.BytesIO(data))
    return path


def tar_with(path: Path, **fields: object) -> Path:
    """A tar whose one entry has the given header fields."""
    info = tarfile.TarInfo(CONFIG)
    for field, value in fields.items():
        setattr(info, field, value)
    with tarfile.open(path, "w") as archive:
        archive.addfile(info)
    return path


def codes(error: AdapterInvalid) -> list[str]:
    return [reason.code for reason in error.reasons]


def outside(store_root: Path) -> set[str]:
    """Everything on disk beside the staging area."""
    root = store_root.parent
    return {str(path.relative_to(root)) for path in root.rglob("*") if "staging" not in path.parts}


# files


def test_files_arrive_in_pieces(upload: StagedUpload, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        assert upload.write(name, (data[i : i + 7] for i in range(0, len(data), 7))) == len(data)
    assert {path.name: path.read_bytes() for path in upload.folder.iterdir()} == files
    assert read_adapter(upload.folder, corpus_base()).kind == "lora"


def test_harmless_files_are_named_and_dropped(upload: StagedUpload) -> None:
    upload.write("README.md", [b"# hello"])
    upload.write("vocab.json", [b"{}" * 1000])
    assert upload.skipped == ["README.md", "vocab.json"]
    assert list(upload.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("adapter_model.bin", "pickle_refused"),
        ("optimizer.pt", "pickle_refused"),
        ("weights.PKL", "pickle_refused"),
        ("more.tar.gz", "nested_archive"),
        ("../adapter_config.json", "unexpected_file"),
        ("/etc/passwd", "unexpected_file"),
        ("a/../../x.md", "unexpected_file"),
        ("..\\x.md", "unexpected_file"),
        ("ADAPTER_CONFIG.JSON", "unexpected_file"),
        ("adapter_config.json\0.md", "unexpected_file"),
        ("", "unexpected_file"),
        (".", "unexpected_file"),
        ("adapter_ｃonfig.json", "unexpected_file"),
    ],
)
def test_other_names_are_refused(
    name: str, code: str, upload: StagedUpload, store: AdapterStore, tmp_path: Path
) -> None:
    before = outside(tmp_path / "store")
    with pytest.raises(AdapterInvalid) as raised:
        upload.write(name, [b"x"])
    assert codes(raised.value) == [code]
    assert list(upload.folder.iterdir()) == []
    assert outside(tmp_path / "store") == before


def test_a_name_twice_is_refused(upload: StagedUpload) -> None:
    upload.write(CONFIG, [b"{}"])
    with pytest.raises(AdapterInvalid, match="duplicate_file"):
        upload.write(CONFIG, [b"{}"])
    upload.write("README.md", [b""])
    with pytest.raises(AdapterInvalid, match="duplicate_file"):
        upload.write("README.md", [b""])


def test_a_planted_link_is_not_followed(upload: StagedUpload, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    (upload.folder / CONFIG).symlink_to(target)
    with pytest.raises(FileExistsError):
        upload.write(CONFIG, [b"overwritten"])
    assert target.read_text() == "mine"


def test_caps_hold_while_bytes_arrive(store: AdapterStore) -> None:
    """The sender is stopped at the cap, not after it has sent everything."""
    num_sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal num_sent
        while True:
            num_sent += 1 << 16
            yield b"x" * (1 << 16)

    with Staging(store).open() as staged, pytest.raises(UploadTooLarge):
        staged.write(CONFIG, endless())
    assert num_sent <= (1 << 20) + (1 << 16)
    limits = UploadLimits(max_total_bytes=100)
    with Staging(store, limits=limits).open() as staged, pytest.raises(UploadTooLarge):
        staged.write("README.md", endless())
    with Staging(store, limits=limits).open() as staged:
        staged.write(TENSORS, [b"x" * 60])
        with pytest.raises(UploadTooLarge):
            staged.write(CONFIG, [b"x" * 60])
    with Staging(store, limits=limits).open() as staged, staged.archive_writer() as writer:
        writer.write(b"x" * 100)
        with pytest.raises(UploadTooLarge):
            writer.write(b"x")


def test_number_of_files_is_capped(store: AdapterStore) -> None:
    with Staging(store, limits=UploadLimits(max_entries=2)).open() as staged:
        staged.write("a.md", [b""])
        staged.write("b.md", [b""])
        with pytest.raises(AdapterInvalid, match="too many files"):
            staged.write("c.md", [b""])


def test_quota_stops_an_upload(tmp_path: Path) -> None:
    with AdapterStore.open(tmp_path / "small", quota_bytes=1000) as store:
        with Staging(store).open() as staged, pytest.raises(StoreFull) as raised:
            staged.write(TENSORS, [b"x" * 600, b"x" * 600])
        assert raised.value.status == 507
        assert list(store.scratch_dir.iterdir()) == []
        with Staging(store).open() as staged, staged.archive_writer() as writer, pytest.raises(StoreFull):
            writer.write(b"x" * 1001)


def test_discarded_whatever_happens(store: AdapterStore, files: dict[str, bytes]) -> None:
    def leaving() -> Iterator[bytes]:
        yield files[CONFIG]
        raise ConnectionError

    with Staging(store).open() as staged, pytest.raises(ConnectionError):
        staged.write(CONFIG, leaving())
    staged.discard()
    assert list(store.scratch_dir.iterdir()) == []


# archives


@pytest.mark.parametrize("prefix", ["", "./", "adapter/", "./adapter/"])
@pytest.mark.parametrize("kind", ["zip", "zip-stored", "tar", "tar.gz", "gnu", "ustar"])
def test_good_archives(kind: str, prefix: str, store: AdapterStore, files: dict[str, bytes], tmp_path: Path) -> None:
    entries = {f"{prefix}{name}": data for name, data in files.items()} | {f"{prefix}README.md": b"# hi"}
    path = tmp_path / "archive.bin"
    if kind.startswith("zip"):
        make_zip(path, entries, method=zipfile.ZIP_STORED if kind == "zip-stored" else zipfile.ZIP_DEFLATED)
    elif kind == "tar.gz":
        make_tar(path, entries, "w:gz")
    else:
        formats = {"tar": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}
        make_tar(path, entries, format=formats[kind])
    with Staging(store).open() as staged:
        staged.unpack(path)
        assert {entry.name: entry.read_bytes() for entry in staged.folder.iterdir()} == files
        assert staged.skipped == ["README.md"]
        assert read_adapter(staged.folder, corpus_base()).kind == "lora"
        for entry in staged.folder.iterdir():
            assert stat.S_IMODE(entry.stat().st_mode) == 0o600


@pytest.mark.parametrize("packed", ["members", "padded", "named", "at the brim"])
def test_gzip_as_other_tools_write_it(
    packed: str, upload: StagedUpload, files: dict[str, bytes], tmp_path: Path
) -> None:
    tar = make_tar(tmp_path / "a.tar", files).read_bytes()
    cut = len(tar) // 3
    data = {
        "members": gzip.compress(tar[:cut]) + gzip.compress(b"") + gzip.compress(tar[cut:]),
        "padded": gzip.compress(tar) + bytes(200_000),
        "named": b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * (20 << 20) + b"\0" + gzip.compress(tar)[10:],
        "at the brim": gzip.compress(tar.rstrip(b"\0") + bytes(-len(tar.rstrip(b"\0")) % 512)),
    }[packed]
    path = tmp_path / "a.tar.gz"
    path.write_bytes(data)
    upload.unpack(path)
    assert {entry.name: entry.read_bytes() for entry in upload.folder.iterdir()} == files


def test_archive_received_in_pieces(upload: StagedUpload, files: dict[str, bytes], tmp_path: Path) -> None:
    data = make_zip(tmp_path / "a.zip", files).read_bytes()
    with upload.archive_writer() as writer:
        for start in range(0, len(data), 1000):
            writer.write(data[start : start + 1000])
    upload.unpack()
    assert not upload.archive_path.exists()
    assert read_adapter(upload.folder, corpus_base()).kind == "lora"


def test_what_a_mac_adds_is_passed_over(upload: StagedUpload, files: dict[str, bytes], tmp_path: Path) -> None:
    extra = {f"__MACOSX/._{CONFIG}": b"\0\5", "._adapter_config.json": b"\0", ".DS_Store": b"\0"}
    upload.unpack(make_zip(tmp_path / "a.zip", {**files, **extra}))
    assert {path.name for path in upload.folder.iterdir()} == set(files)


BAD_PATHS = {
    "../adapter_config.json": "archive_path",
    "adapter/../../adapter_config.json": "archive_path",
    "/adapter_config.json": "archive_path",
    "C:/adapter_config.json": "archive_path",
    "a\\adapter_config.json": "archive_path",
    "a/b/adapter_config.json": "archive_path",
    "adapter_config.json\n": "archive_path",
    "other/README.md": "archive_path",
    "ADAPTER_CONFIG.JSON": "duplicate_file",
    "adapter_ｃonfig.json": "duplicate_file",
    "adapter_model.bin": "pickle_refused",
    "inner.zip": "nested_archive",
    "run.sh": "unexpected_file",
}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("name", BAD_PATHS)
def test_bad_names_in_archives(
    name: str, kind: str, store: AdapterStore, files: dict[str, bytes], tmp_path: Path
) -> None:
    entries = {**files, name: PICKLE}
    path = tmp_path / "bad"
    if kind == "zip":
        make_zip(path, entries)
    else:
        make_tar(path, entries, "w:gz" if kind == "tar.gz" else "w")
    before = outside(tmp_path / "store")
    with Staging(store).open() as staged, pytest.raises(AdapterInvalid) as raised:
        staged.unpack(path)
    assert codes(raised.value) == [BAD_PATHS[name]]
    assert outside(tmp_path / "store") == before
    assert list(store.scratch_dir.iterdir()) == []


def test_all_reasons_of_an_archive(upload: StagedUpload, tmp_path: Path) -> None:
    entries = {"../x": b"", "model.pkl": b"", "run.py": b""}
    for path in (make_zip(tmp_path / "a.zip", entries), make_tar(tmp_path / "a.tar", entries)):
        with pytest.raises(AdapterInvalid) as raised:
            upload.unpack(path)
        assert codes(raised.value) == ["archive_path", "pickle_refused", "unexpected_file"]


def _zip_symlink(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo(CONFIG)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return path


def _zip_encrypted(path: Path) -> Path:
    data = bytearray(make_zip(path, {CONFIG: b"{}"}).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + offset] |= 1
    path.write_bytes(data)
    return path


def _zip_method(path: Path) -> Path:
    return make_zip(path, {CONFIG: b"{}"}, method=zipfile.ZIP_LZMA)


def _zip_bomb(path: Path) -> Path:
    return make_zip(path, {TENSORS: bytes(64 << 20)})


def _zip_small_lie(path: Path) -> Path:
    """The directory says 10 bytes; the entry holds 8 MB."""
    data = bytearray(make_zip(path, {CONFIG: bytes(8 << 20)}).read_bytes())
    struct.pack_into("<I", data, data.find(b"PK\x01\x02") + 24, 10)
    path.write_bytes(data)
    return path


def _zip_overlap(path: Path) -> Path:
    """Two directory entries that share one body, as the nested-overlap bomb does."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(CONFIG, b"{}" * 100)
        archive.writestr(TENSORS, b"{}" * 100)
    data = bytearray(path.read_bytes())
    second = data.rfind(b"PK\x01\x02")
    struct.pack_into("<I", data, second + 42, 0)
    path.write_bytes(data)
    return path


def _zip_many(path: Path) -> Path:
    return make_zip(path, {f"{i}.md": b"" for i in range(65)})


def _zip_hidden_front(path: Path) -> Path:
    path.write_bytes(b"PK\x03\x04" + b"#!/bin/sh\n" * 10 + make_zip(path, {CONFIG: b"{}"}).read_bytes())
    return path


def _zip_bad_crc(path: Path) -> Path:
    data = bytearray(make_zip(path, {CONFIG: b"{}" * 50}, method=zipfile.ZIP_STORED).read_bytes())
    data[30 + len(CONFIG) + 3] ^= 1
    path.write_bytes(data)
    return path


def _zip_local_name(path: Path) -> Path:
    """The entry's own header has a name that is not the UTF-8 it says it is."""
    data = bytearray(make_zip(path, {CONFIG: b"{}"}).read_bytes())
    struct.pack_into("<H", data, 6, 0x800)
    data[30] = 0xFF
    path.write_bytes(data)
    return path


def _zip_cut(path: Path) -> Path:
    path.write_bytes(make_zip(path, {CONFIG: b"{}" * 50}).read_bytes()[:-30])
    return path


def _zip64(path: Path) -> Path:
    data = bytearray(make_zip(path, {CONFIG: b"{}"}).read_bytes())
    struct.pack_into("<I", data, data.rfind(b"PK\x05\x06") + 16, 0xFFFFFFFF)
    path.write_bytes(data)
    return path


def _tar_sparse(path: Path) -> Path:
    return tar_with(path, type=tarfile.GNUTYPE_SPARSE)


def _tar_pax_sparse(path: Path) -> Path:
    return tar_with(path, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": "99999999"})


def _tar_gz_bomb(path: Path) -> Path:
    return make_tar(path, {TENSORS: bytes(64 << 20)}, "w:gz")


def _tar_many(path: Path) -> Path:
    return make_tar(path, {f"._{i}": b"" for i in range(600)}, format=tarfile.USTAR_FORMAT)


def _raw_header(kind: bytes, size: bytes, name: bytes = b"x") -> bytes:
    header = bytearray(512)
    header[:100] = name.ljust(100, b"\0")
    header[100:108] = b"0000600\0"
    header[124:136] = size
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _tar_header_bomb(path: Path) -> Path:
    """An extended header that claims 4 GB, which the standard library would read into memory."""
    path.write_bytes(_raw_header(b"x", b"37777777777\0") + bytes(4096))
    return path


def _tar_negative(path: Path) -> Path:
    path.write_bytes(_raw_header(b"0", b"-0000000001\0", CONFIG.encode()) + bytes(2048))
    return path


def _tar_pax_size(path: Path) -> Path:
    """A size of so many digits that Python refuses to make a number of it."""
    record = b"5011 size=" + b"9" * 5000 + b"\n"
    header = _raw_header(b"x", b"%011o\0" % len(record), b"pax")
    path.write_bytes(header + record + bytes(-len(record) % 512) + _raw_header(b"0", b"00000000000\0", CONFIG.encode()))
    return path


def _tar_huge(path: Path) -> Path:
    path.write_bytes(_raw_header(b"0", b"\x80" + b"\0" * 3 + b"\xff" * 8, CONFIG.encode()) + bytes(2048))
    return path


def _tar_cut(path: Path) -> Path:
    path.write_bytes(make_tar(path, {CONFIG: b"x" * 5000}).read_bytes()[:2000])
    return path


def _tar_checksum(path: Path) -> Path:
    data = bytearray(make_tar(path, {CONFIG: b"{}"}, format=tarfile.USTAR_FORMAT).read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    return path


def _gz_of_nothing(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"hello" * 1000))
    return path


def _gz_cut(path: Path) -> Path:
    path.write_bytes(make_tar(path, {CONFIG: os.urandom(5000)}, "w:gz").read_bytes()[:3000])
    return path


def _not_an_archive(path: Path) -> Path:
    path.write_bytes(PICKLE)
    return path


def _empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


BAD_ARCHIVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zip symlink": (_zip_symlink, "not_a_regular_file"),
    "zip encrypted": (_zip_encrypted, "bad_archive"),
    "zip of another method": (_zip_method, "bad_archive"),
    "zip bomb": (_zip_bomb, "archive_bomb"),
    "zip size that lies": (_zip_small_lie, "bad_archive"),
    "zip overlap": (_zip_overlap, "archive_bomb"),
    "zip of many": (_zip_many, "archive_bomb"),
    "zip with a script in front": (_zip_hidden_front, "bad_archive"),
    "zip bad checksum": (_zip_bad_crc, "bad_archive"),
    "zip cut": (_zip_cut, "bad_archive"),
    "zip local name": (_zip_local_name, "bad_archive"),
    "zip64 sizes": (_zip64, "bad_archive"),
    "tar symlink": (lambda path: tar_with(path, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not_a_regular_file"),
    "tar hard link": (lambda path: tar_with(path, type=tarfile.LNKTYPE, linkname="../../x"), "not_a_regular_file"),
    "tar device": (lambda path: tar_with(path, type=tarfile.CHRTYPE), "not_a_regular_file"),
    "tar pipe": (lambda path: tar_with(path, type=tarfile.FIFOTYPE), "not_a_regular_file"),
    "tar sparse": (_tar_sparse, "not_a_regular_file"),
    "tar pax sparse": (_tar_pax_sparse, "not_a_regular_file"),
    "tar.gz bomb": (_tar_gz_bomb, "archive_bomb"),
    "tar of many": (_tar_many, "archive_bomb"),
    "tar header bomb": (_tar_header_bomb, "archive_bomb"),
    "tar negative size": (_tar_negative, "file_too_large"),
    "tar huge size": (_tar_huge, "file_too_large"),
    "tar size of 5000 digits": (_tar_pax_size, "file_too_large"),
    "tar cut": (_tar_cut, "bad_archive"),
    "tar bad checksum": (_tar_checksum, "bad_archive"),
    "gzip of text": (_gz_of_nothing, "bad_archive"),
    "gzip cut": (_gz_cut, "bad_archive"),
    "a pickle": (_not_an_archive, "bad_archive"),
    "nothing": (_empty, "bad_archive"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_bad_archives(name: str, store: AdapterStore, tmp_path: Path) -> None:
    make, code = BAD_ARCHIVES[name]
    path = make(tmp_path / "bad")
    before = outside(tmp_path / "store")
    tracemalloc.start()
    try:
        with Staging(store).open() as staged, pytest.raises(AdapterInvalid) as raised:
            staged.unpack(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert code in codes(raised.value)
    assert peak < 20 << 20
    assert outside(tmp_path / "store") == before
    assert list(store.scratch_dir.iterdir()) == []


def test_many_zip_entries_are_never_parsed(store: AdapterStore, tmp_path: Path) -> None:
    """The end record is believed only as far as it makes us stop: 60,000 entries cost no time."""
    path = make_zip(tmp_path / "many.zip", {f"{i}": b"" for i in range(20_000)}, method=zipfile.ZIP_STORED)
    tracemalloc.start()
    try:
        with Staging(store).open() as staged, pytest.raises(AdapterInvalid, match="20000 entries"):
            staged.unpack(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
