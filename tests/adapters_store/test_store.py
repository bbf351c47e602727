"""The store as its callers see it: versions, names, aliases, rollback, quota, retention, verification, locking."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaserve_store.digest import content_digest
from deltaserve_store.errors import (
    InvalidName,
    NameTaken,
    NotFound,
    StoreCorrupt,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    VersionConflict,
)
from deltaserve_store.formats import read_adapter
from deltaserve_store.manifest import AdapterManifest
from deltaserve_store.results import CommitResult
from deltaserve_store.staging import Staging
from deltaserve_store.store import AdapterStore
from deltatest.adapter_corpus import CONFIG, FINGERPRINT, GOOD, TENSORS, corpus_base, edit_config, write_good_lora

BASE_NAME = "tests/corpus-base"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    with AdapterStore.open(tmp_path / "store", base_names=(BASE_NAME, "corpus")) as store:
        yield store


def commit(store: AdapterStore, name: str = "a", seed: int = 0, kind: str = "lora", **options: Any) -> CommitResult:
    """Admits a good adapter whose content depends on ``seed``, through a staged upload."""
    with Staging(store).open() as staged:
        GOOD[kind](staged.folder, seed=seed)  # type: ignore[call-arg]
        parsed = read_adapter(staged.folder, corpus_base())
        return store.commit(staged.folder, parsed, name=name, base_fingerprint=FINGERPRINT, **options)


# commit


@pytest.mark.parametrize("kind", GOOD)
def test_commit_and_read_back(kind: str, store: AdapterStore, tmp_path: Path) -> None:
    result = commit(
        store,
        kind=kind,
        evidence={"effect": 0.25, "max_error": 1e-6},
        evidence_key="k",
        waivers=["base"],
        source="upload",
    )
    record = result.record
    assert result.created
    assert len(record.version) == 64
    assert (record.name, record.tenant, record.state, record.is_current) == ("a", "default", "stored", True)
    assert (record.effect, record.waivers, record.source) == (0.25, ("base",), "upload")
    assert record.base.fingerprint == FINGERPRINT
    assert record.kinds == ("lora" if kind == "lora" else "sparse",)
    assert store.get("default", "a") == record
    assert store.get_evidence(record.version, "k") == {"effect": 0.25, "max_error": 1e-6}
    assert store.verify(record.version) == ()
    again = read_adapter(tmp_path / "store" / "versions" / record.version, corpus_base())
    assert again.num_parameters == record.num_parameters
    assert list(store.scratch_dir.iterdir()) == []


def test_a_version_folder_reads_like_an_upload(store: AdapterStore) -> None:
    """The manifest beside the files does not stand in the way of reading them again."""
    record = commit(store).record
    assert read_adapter(store.version_dir(record.version), corpus_base()).kind == "lora"
    manifest = AdapterManifest.from_json((store.version_dir(record.version) / "manifest.json").read_text())
    assert manifest.version == record.version
    assert {file.name for file in manifest.files} == {CONFIG, TENSORS}


def test_identical_bytes_are_one_version(store: AdapterStore) -> None:
    first, second = commit(store), commit(store)
    assert (first.created, second.created) == (True, False)
    assert first.record.version == second.record.version
    assert len(store.versions("default", "a")) == 1
    other = commit(store, name="b")
    assert other.created
    assert other.record.version == first.record.version
    assert store.used_bytes() == first.record.bytes


def test_new_bytes_move_the_name(store: AdapterStore) -> None:
    versions = [commit(store, seed=seed).record.version for seed in range(3)]
    assert len(set(versions)) == 3
    assert store.get("default", "a").version == versions[-1]
    assert [record.version for record in store.versions("default", "a")] == versions[::-1]
    assert [record.is_current for record in store.versions("default", "a")] == [True, False, False]
    back = commit(store, seed=0)
    assert not back.created
    assert store.get("default", "a").version == versions[0]


def test_expected_version(store: AdapterStore) -> None:
    with pytest.raises(VersionConflict):
        commit(store, expected_version="0" * 64)
    first = commit(store, expected_version="none").record.version
    with pytest.raises(VersionConflict) as raised:
        commit(store, seed=1, expected_version="none")
    assert first in raised.value.message
    assert raised.value.status == 409
    for wrong in ("", "f" * 64, first[:7], "../x"):
        with pytest.raises(VersionConflict):
            commit(store, seed=1, expected_version=wrong)
    assert store.get("default", "a").version == first
    assert commit(store, seed=1, expected_version=first).created
    assert commit(store, seed=2, expected_version=store.get("default", "a").version[:8]).created
    assert {path.name for path in (store.version_dir(first).parent).iterdir()} == {
        record.version for record in store.versions("default", "a")
    }


def test_concurrent_uploads_of_one_name(store: AdapterStore) -> None:
    """Compare-and-swap: of many uploads that expect a new name exactly one wins, and the name has its bytes."""
    outcomes: dict[int, str] = {}

    def upload(seed: int) -> None:
        try:
            outcomes[seed] = commit(store, seed=seed, expected_version="none").record.version
        except VersionConflict:
            outcomes[seed] = "conflict"

    threads = [threading.Thread(target=upload, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [version for version in outcomes.values() if version != "conflict"]
    assert len(winners) == 1
    assert store.get("default", "a").version == winners[0]
    assert [path.name for path in store.version_dir(winners[0]).parent.iterdir()] == winners


def test_concurrent_commits_of_many_names(store: AdapterStore) -> None:
    results: list[CommitResult] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(commit(store, name=f"n{i}", seed=i % 3))) for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.record.name for result in results) == sorted(f"n{i}" for i in range(12))
    assert len({result.record.version for result in results}) == 3


def test_digest_is_of_the_meaning(tmp_path: Path) -> None:
    """Set order of targets, white space and file order do not count; a changed value or pattern order does."""
    one = write_good_lora(tmp_path / "one")
    digest = content_digest(one)
    edit_config(target_modules=["v_proj", "q_proj"])(one)
    assert content_digest(one) == digest
    (one / CONFIG).write_text((one / CONFIG).read_text() + "\n\n")
    assert content_digest(one) == digest
    edit_config(lora_alpha=9)(one)
    assert content_digest(one) != digest
    edit_config(lora_alpha=8, alpha_pattern={"q_proj": 1, "v_proj": 2})(one)
    pattern = content_digest(one)
    edit_config(alpha_pattern={"v_proj": 2, "q_proj": 1})(one)
    assert content_digest(one) != pattern
    assert content_digest(write_good_lora(tmp_path / "two", seed=1)) != digest


def test_files_from_elsewhere_are_copied(store: AdapterStore, tmp_path: Path) -> None:
    """Whoever keeps the source folder keeps no hold on the stored bytes."""
    source = write_good_lora(tmp_path / "mine")
    record = store.commit(source, read_adapter(source, corpus_base()), name="a", base_fingerprint=FINGERPRINT).record
    with open(source / TENSORS, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"evil")
    assert store.verify(record.version) == ()


# names


def test_names_are_checked(store: AdapterStore) -> None:
    for name in ("", ".a", "-a", "a/b", "a b", "a@b", "a:b", "a" * 65, "ä", "a\n", "../a", "a\0"):
        with pytest.raises(InvalidName):
            commit(store, name=name)
    assert commit(store, name="A9._-" + "a" * 59).created


def test_names_and_aliases_share_one_space(store: AdapterStore) -> None:
    commit(store, name="a")
    store.alias("default", "prod", "a")
    with pytest.raises(NameTaken):
        commit(store, name="prod", seed=1)
    with pytest.raises(NameTaken):
        store.alias("default", "a", "a")
    with pytest.raises(NameTaken):
        commit(store, name="corpus")
    with pytest.raises(NameTaken):
        store.alias("default", "corpus", "a")
    with pytest.raises(NotFound):
        store.alias("default", "x", "prod")
    with pytest.raises(NotFound):
        store.alias("default", "x", "nothing")


def test_a_base_name_that_an_adapter_has(store: AdapterStore) -> None:
    commit(store, name="mine")
    with pytest.raises(NameTaken, match="mine"):
        store.set_base_names(["mine"])
    assert store.snapshot().base_names == (BASE_NAME, "corpus")


def test_tenants_do_not_see_each_other(store: AdapterStore) -> None:
    commit(store, name="a", tenant="red")
    with pytest.raises(NotFound):
        store.get("blue", "a")
    assert store.list("blue") == ()
    other = commit(store, name="a", tenant="blue")
    assert other.created
    store.alias("red", "x", "a")
    store.delete("blue", "a")
    assert store.get("red", "x").tenant == "red"
    with pytest.raises(NotFound):
        store.rollback("blue", "a")


def test_alias_follows_or_stays(store: AdapterStore) -> None:
    first = commit(store).record.version
    store.alias("default", "prod", "a")
    store.alias("default", "pinned", f"a@{first[:8]}")
    second = commit(store, seed=1).record.version
    assert store.get("default", "prod").version == second
    assert store.get("default", "pinned").version == first
    store.alias("default", "pinned", "a")
    assert store.get("default", "pinned").version == second
    assert set(store.aliases("default")) == {"prod", "pinned"}
    with pytest.raises(NotFound):
        store.alias("default", "pinned", "a@" + "0" * 8)


def test_rollback(store: AdapterStore) -> None:
    versions = [commit(store, seed=seed).record.version for seed in range(3)]
    assert store.rollback("default", "a").version == versions[1]
    assert store.rollback("default", "a").version == versions[0]
    with pytest.raises(NotFound, match="no version before"):
        store.rollback("default", "a")
    assert store.rollback("default", "a", versions[2][:10]).version == versions[2]
    assert store.get("default", "a").is_current
    for wrong in ("0" * 64, "", "zz", versions[0][:7]):
        with pytest.raises(NotFound):
            store.rollback("default", "a", wrong)
    with pytest.raises(NotFound):
        store.rollback("default", "nothing")


def test_delete(store: AdapterStore) -> None:
    version = commit(store).record.version
    store.alias("default", "prod", "a")
    with pytest.raises(NameTaken, match="prod") as raised:
        store.delete("default", "a")
    assert raised.value.error_code == "name_in_use"
    store.delete("default", "prod")
    store.delete("default", "a")
    with pytest.raises(NotFound):
        store.delete("default", "a")
    with pytest.raises(NotFound):
        store.get("default", "a")
    assert store.version_dir(version).exists(), "running requests still read it"
    assert commit(store, seed=1).created
    assert len(store.versions("default", "a")) == 1, "a new life of the name has no old versions"


def test_paging(store: AdapterStore) -> None:
    names = [f"n{i:02}" for i in range(7)]
    for name in names:
        commit(store, name=name)
    seen: list[str] = []
    after: str | None = None
    while page := store.list("default", limit=3, after=after):
        seen += [record.name for record in page]
        after = page[-1].name
    assert seen == names
    for limit in (0, -1, 10**6):
        with pytest.raises(InvalidName):
            store.list("default", limit=limit)


def test_snapshots_do_not_change(store: AdapterStore) -> None:
    first = commit(store).record.version
    before = store.snapshot()
    second = commit(store, seed=1).record.version
    commit(store, name="b")
    assert before.resolve("default", "a").version == first
    assert before.names("default") == ("a",)
    assert store.snapshot().resolve("default", "a").version == second
    assert pickle.loads(pickle.dumps(store.snapshot())) == store.snapshot()  # noqa: S301


# space


def test_quota(tmp_path: Path) -> None:
    with AdapterStore.open(tmp_path / "s", quota_bytes=9000) as store:
        size = commit(store).record.bytes
        assert store.room_bytes() == 9000 - size
        with pytest.raises(StoreFull) as raised:
            _commit_big(store)
        assert raised.value.status == 507
        assert store.used_bytes() == size
        assert list(store.scratch_dir.iterdir()) == []
        assert not commit(store).created, "what is stored already needs no room"
        store.delete("default", "a")
        assert store.gc().num_bytes == size
        assert store.room_bytes() == 9000


def _commit_big(store: AdapterStore) -> CommitResult:
    with Staging(store).open() as staged:
        write_good_lora(staged.folder, rank=24)
        parsed = read_adapter(staged.folder, corpus_base())
        return store.commit(staged.folder, parsed, name="big", base_fingerprint=FINGERPRINT)


def test_gc_keeps_what_is_wanted(store: AdapterStore) -> None:
    versions = [commit(store, seed=seed).record.version for seed in range(6)]
    store.alias("default", "pinned", f"a@{versions[1]}")
    store.rollback("default", "a", versions[0])
    derived = store.derived_dir(versions[2], "key")
    derived.mkdir(parents=True)
    result = store.gc(keep=2, protect=[versions[3]])
    assert set(result.versions) == {versions[2]}
    assert not store.version_dir(versions[2]).exists()
    assert not derived.exists()
    assert {record.version for record in store.versions("default", "a")} == set(versions) - {versions[2]}
    assert set(store.gc(keep=2).versions) == {versions[3]}
    assert store.gc(keep=2).versions == ()
    assert store.get("default", "pinned").version == versions[1]
    with pytest.raises(InvalidName):
        store.gc(keep=0)


def test_gc_of_deleted_names_spares_what_runs(store: AdapterStore) -> None:
    version = commit(store).record.version
    commit(store, name="same")
    store.delete("default", "a")
    assert store.gc().versions == (), "another name has these bytes"
    store.delete("default", "same")
    assert store.gc(protect=[version]).versions == ()
    store.put_evidence(version, "k", {"x": 1})
    assert store.gc().versions == (version,)
    assert store.get_evidence(version, "k") is None
    assert store.used_bytes() == 0


# evidence and derived files


def test_evidence(store: AdapterStore) -> None:
    version = commit(store).record.version
    assert store.get_evidence(version, "k") is None
    store.put_evidence(version, "k", {"effect": 1.0})
    store.put_evidence(version, "k", {"effect": 2.0})
    assert store.get_evidence(version, "k") == {"effect": 2.0}
    with pytest.raises(NotFound):
        store.put_evidence("0" * 64, "k", {})


def test_derived_dir_is_by_version_and_key(store: AdapterStore) -> None:
    version = commit(store).record.version
    assert store.derived_dir(version, "fp-float32-fold1") != store.derived_dir(version, "fp-bfloat16-fold1")
    for key in ("", "..", "a/b", ".x", "a" * 201):
        with pytest.raises(InvalidName):
            store.derived_dir(version, key)
    for bad in ("..", "", "A" * 64, version[:8]):
        with pytest.raises(InvalidName):
            store.derived_dir(bad, "k")
        with pytest.raises(InvalidName):
            store.version_dir(bad)


# damage


def test_bit_rot_is_found(store: AdapterStore) -> None:
    version, other = commit(store).record.version, commit(store, name="b", seed=1).record.version
    path = store.version_dir(version) / TENSORS
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert [(reason.code, reason.where) for reason in store.verify(version)] == [("bit_rot", TENSORS)]
    assert store.get("default", "a").state == "failed"
    assert store.verify(other) == ()
    assert store.get("default", "b").state == "stored"
    path.write_bytes(good)
    assert store.verify(version) == ()
    assert store.get("default", "a").state == "stored"
    with pytest.raises(NotFound):
        store.verify("0" * 64)


def test_config_and_manifest_rot(store: AdapterStore) -> None:
    version = commit(store).record.version
    folder = store.version_dir(version)
    config = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(config.replace('"r": 4', '"r": 5'))
    assert [reason.where for reason in store.verify(version)] == [CONFIG]
    (folder / CONFIG).write_text(config)
    (folder / "manifest.json").write_text("{}")
    assert [reason.code for reason in store.verify(version)] == ["missing_file"]


def test_reupload_mends_a_damaged_version(store: AdapterStore) -> None:
    version = commit(store).record.version
    (store.version_dir(version) / TENSORS).unlink()
    assert [reason.code for reason in store.verify(version)] == ["missing_file"]
    assert commit(store).record.version == version
    assert store.verify(version) == ()
    assert store.get("default", "a").state == "stored"


def test_reupload_mends_rot_that_kept_the_size(tmp_path: Path) -> None:
    with AdapterStore.open(tmp_path / "s") as store:
        version = commit(store).record.version
        path = store.version_dir(version) / TENSORS
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        assert [reason.code for reason in store.verify(version)] == ["bit_rot"]
    with AdapterStore.open(tmp_path / "s") as store:
        assert store.get("default", "a").state == "failed", "a restart does not make damaged bytes good"
        assert commit(store).record.version == version
        assert path.read_bytes() == good
        assert store.get("default", "a").state == "stored"


def test_start_finds_missing_and_unknown_folders(tmp_path: Path) -> None:
    with AdapterStore.open(tmp_path / "s") as store:
        gone, cut, good = (commit(store, name=name, seed=i).record.version for i, name in enumerate("abc"))
        (store.version_dir(cut) / TENSORS).write_bytes(b"x")
        for path in store.version_dir(gone).iterdir():
            path.unlink()
        store.version_dir(gone).rmdir()
        (store.version_dir("f" * 64)).mkdir()
        (store.scratch_dir / "upload-left").mkdir()
        store.derived_dir("e" * 64, "k").mkdir(parents=True)
    with AdapterStore.open(tmp_path / "s") as store:
        assert len(store.report) == 4
        assert [store.get("default", name).state for name in "abc"] == ["failed", "failed", "stored"]
        assert "missing_file" in (store.get("default", "a").state_reason or "")
        assert [path.name for path in store.version_dir(good).parent.iterdir() if path.name == "f" * 64] == []
        assert len(list((tmp_path / "s" / "quarantine").iterdir())) == 1
        assert not store.derived_dir("e" * 64, "k").parent.exists()
        assert list(store.scratch_dir.iterdir()) == []
        store.gc()
        assert list((tmp_path / "s" / "quarantine").iterdir()) == []
    with AdapterStore.open(tmp_path / "s") as store:
        assert len(store.report) == 2, "damage stays told"


def test_damaged_database(tmp_path: Path) -> None:
    with AdapterStore.open(tmp_path / "s") as store:
        commit(store)
    database = tmp_path / "s" / "store.db"
    data = database.read_bytes()
    database.write_bytes(b"not a database, really" * 100)
    with pytest.raises(StoreCorrupt):
        AdapterStore.open(tmp_path / "s")
    database.write_bytes(data)
    with AdapterStore.open(tmp_path / "s") as store:
        assert store.get("default", "a").state == "stored"


def test_store_of_a_newer_program(tmp_path: Path) -> None:
    import sqlite3

    AdapterStore.open(tmp_path / "s").close()
    with sqlite3.connect(tmp_path / "s" / "store.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreCorrupt, match="format 99"):
        AdapterStore.open(tmp_path / "s")
    AdapterStore.open(tmp_path / "other").close()


# opening


def test_everything_survives_reopening(tmp_path: Path) -> None:
    with AdapterStore.open(tmp_path / "s") as store:
        for seed in range(3):
            commit(store, seed=seed)
        commit(store, name="b", kind="sparse", tenant="red")
        store.alias("default", "prod", "a")
        store.rollback("default", "a")
        before = store.snapshot()
    with AdapterStore.open(tmp_path / "s") as store:
        assert store.snapshot() == before
        assert store.report == ()


def test_second_server_is_told_where_the_first_is(tmp_path: Path) -> None:
    with AdapterStore.open(tmp_path / "s") as store:
        with pytest.raises(StoreLocked) as raised:
            AdapterStore.open(tmp_path / "s")
        assert raised.value.url is None
        store.set_url("http://127.0.0.1:8000")
        with pytest.raises(StoreLocked, match=r"127\.0\.0\.1:8000") as raised:
            AdapterStore.open(tmp_path / "s")
        assert raised.value.url == "http://127.0.0.1:8000"
    AdapterStore.open(tmp_path / "s").close()


def test_reading_beside_a_server(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        AdapterStore.open(tmp_path / "s", lock=False)
    with AdapterStore.open(tmp_path / "s") as store:
        version = commit(store).record.version
        with AdapterStore.open(tmp_path / "s", lock=False) as reader:
            assert reader.get("default", "a").version == version
            assert reader.verify(version) == ()
            for change in (
                lambda: reader.delete("default", "a"),
                lambda: reader.alias("default", "b", "a"),
                lambda: reader.rollback("default", "a"),
                lambda: reader.gc(),
                lambda: reader.put_evidence(version, "k", {}),
                lambda: reader.scratch_dir,
            ):
                with pytest.raises(StoreReadOnly):
                    change()
    with AdapterStore.open(tmp_path / "s", lock=False) as reader:
        assert reader.get("default", "a").version == version


def test_private_on_disk(store: AdapterStore, tmp_path: Path) -> None:
    record = commit(store).record
    for path in (tmp_path / "store", store.version_dir(record.version), store.scratch_dir):
        assert path.stat().st_mode & 0o077 == 0
