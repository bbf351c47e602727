"""Random operations against a model made of dictionaries, with reopening in between."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from deltaserve_store.errors import NameTaken, NotFound, VersionConflict
from deltaserve_store.formats import read_adapter
from deltaserve_store.store import AdapterStore
from deltatest.adapter_corpus import FINGERPRINT, corpus_base, write_good_lora

NAMES = st.sampled_from(["a", "b", "c"])
TENANTS = st.sampled_from(["red", "blue"])
SEEDS = st.integers(0, 2)


class StoreAgainstDictionaries(RuleBasedStateMachine):
    """``history``: versions of a name in the order they first came; ``current``; ``aliases``; ``on_disk``."""

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.folders = [write_good_lora(self.root / f"adapter-{seed}", seed=seed) for seed in range(3)]
        self.parsed = [read_adapter(folder, corpus_base()) for folder in self.folders]
        self.history: dict[tuple[str, str], list[str]] = {}
        self.current: dict[tuple[str, str], str] = {}
        self.aliases: dict[tuple[str, str], tuple[str, str | None]] = {}
        self.on_disk: set[str] = set()
        self.store = AdapterStore.open(self.root / "store")

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.root)

    @rule(tenant=TENANTS, name=NAMES, seed=SEEDS, expects=st.sampled_from(["nothing", "current", "none"]))
    def commit(self, tenant: str, name: str, seed: int, expects: str) -> None:
        key = (tenant, name)
        current = self.current.get(key)
        expected = {"nothing": None, "current": current, "none": "none"}[expects]
        try:
            result = self.store.commit(
                self.folders[seed],
                self.parsed[seed],
                tenant=tenant,
                name=name,
                base_fingerprint=FINGERPRINT,
                expected_version=expected,
            )
        except NameTaken:
            assert key in self.aliases
            return
        except VersionConflict:
            assert expected == "none"
            assert current is not None
            return
        assert key not in self.aliases
        assert expected is None or expected == (current or "none")
        known = self.history.setdefault(key, [])
        assert result.created == (result.record.version not in known)
        if result.created:
            known.append(result.record.version)
        self.current[key] = result.record.version
        self.on_disk.add(result.record.version)

    @rule(tenant=TENANTS, alias=NAMES, adapter=NAMES, is_pinned=st.booleans())
    def alias(self, tenant: str, alias: str, adapter: str, is_pinned: bool) -> None:
        version = self.current.get((tenant, adapter), "0" * 64) if is_pinned else None
        try:
            self.store.alias(tenant, alias, f"{adapter}@{version[:12]}" if version else adapter)
        except NameTaken:
            assert (tenant, alias) in self.current
            return
        except NotFound:
            assert (tenant, alias) not in self.current
            assert (tenant, adapter) not in self.current
            return
        assert (tenant, alias) not in self.current
        self.aliases[tenant, alias] = (adapter, version)

    @rule(tenant=TENANTS, name=NAMES)
    def rollback(self, tenant: str, name: str) -> None:
        target, _ = self.aliases.get((tenant, name), (name, None))
        key = (tenant, target)
        known = self.history.get(key, [])
        position = known.index(self.current[key]) if known else 0
        try:
            record = self.store.rollback(tenant, name)
        except NotFound:
            assert position == 0
            return
        assert record.version == known[position - 1]
        assert position > 0
        self.current[key] = record.version

    @rule(tenant=TENANTS, name=NAMES)
    def delete(self, tenant: str, name: str) -> None:
        key = (tenant, name)
        followers = [alias for (owner, alias), (target, _) in self.aliases.items() if (owner, target) == key]
        try:
            self.store.delete(tenant, name)
        except NotFound:
            assert key not in self.current
            assert key not in self.aliases
            return
        except NameTaken:
            assert followers
            return
        assert not followers
        self.aliases.pop(key, None)
        self.current.pop(key, None)
        self.history.pop(key, None)

    @rule(keep=st.integers(1, 3))
    def gc(self, keep: int) -> None:
        pinned = {version for _, version in self.aliases.values()}
        for key, known in self.history.items():
            recent = set(known[-keep:]) | pinned | {self.current[key]}
            self.history[key] = [version for version in known if version in recent]
        wanted = {version for known in self.history.values() for version in known}
        assert set(self.store.gc(keep=keep).versions) == self.on_disk - wanted - pinned
        self.on_disk &= wanted | pinned

    @rule()
    def reopen(self) -> None:
        before = self.store.snapshot()
        self.store.close()
        self.store = AdapterStore.open(self.root / "store")
        assert self.store.report == ()
        assert self.store.snapshot() == before

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        names = self.store.snapshot()
        for tenant in ("red", "blue"):
            own = {name: version for (owner, name), version in self.current.items() if owner == tenant}
            assert {record.name: record.version for record in self.store.list(tenant)} == own
            for name in own:
                versions = [record.version for record in self.store.versions(tenant, name)]
                assert versions == self.history[tenant, name][::-1]
            for (owner, alias), (target, version) in self.aliases.items():
                if owner == tenant:
                    assert names.resolve(tenant, alias).version == (version or self.current[tenant, target])
        assert {path.name for path in (self.root / "store" / "versions").iterdir()} == self.on_disk


TestStoreAgainstDictionaries = StoreAgainstDictionaries.TestCase
TestStoreAgainstDictionaries.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
