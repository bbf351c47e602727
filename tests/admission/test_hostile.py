"""The corpus of damaged, mis-named and hostile adapters through the whole door: none is served, each is told why."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deltaserve.errors import AdapterRefused
from deltaserve.model.base import load_base
from deltaserve_store.errors import StoreError
from deltaserve_store.staging import Staging
from deltatest.adapter_corpus import CORPUS, GOOD, BadAdapter, corpus_base
from deltatest.admission_rig import Rig, open_rig, run
from deltatest.apart_corpus import APART_CORPUS, APART_GOOD
from deltatest.tiny_models import save_random, tiny_config
from deltatest.vector_corpus import VECTOR_CORPUS, VECTOR_GOOD


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A door in front of a real model of the corpus base's shapes; one store for all cases."""
    root = tmp_path_factory.mktemp("hostile")
    config = tiny_config(
        "llama", vocab_size=100, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2
    )
    base = load_base(save_random(config, root / "corpus-base"), dtype=torch.float32, cache_dir=root / "digests")
    spec = corpus_base()
    for name, linear in spec.linears.items():
        assert base.spec.linears[name] == linear
    base.spec = spec
    rig = open_rig(base, root / "store", base_names=spec.names)
    yield rig
    rig.close()


def before_and_after(rig: Rig) -> tuple[object, ...]:
    return rig.store.snapshot(), rig.engine.num_probes, len(rig.engine.published), rig.store.used_bytes()


@pytest.mark.parametrize("kind", GOOD | VECTOR_GOOD | APART_GOOD)
def test_the_good_adapter_behind_each_case_passes(rig: Rig, tmp_path: Path, kind: str) -> None:
    """Without this, a door that refuses everything would pass the cases below."""
    result = run(rig.admit((GOOD | VECTOR_GOOD | APART_GOOD)[kind](tmp_path / kind), f"good-{kind}"))
    assert result.created
    assert rig.engine.names.resolve("default", f"good-{kind}").version == result.record.version


@pytest.mark.parametrize("case", CORPUS + VECTOR_CORPUS + APART_CORPUS, ids=lambda case: case.name)
def test_no_hostile_adapter_is_served(rig: Rig, tmp_path: Path, case: BadAdapter) -> None:
    """However the bytes got into the folder: nothing is proven, stored, published or left behind."""
    folder = case.write(tmp_path / "adapter")
    before = before_and_after(rig)
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admission.admit(folder, name="evil", accept_base=True, accept_no_effect=True))
    assert {code for code, _ in case.reasons} <= {reason.code for reason in caught.value.reasons}
    assert caught.value.status == 422
    assert str(tmp_path) not in str(caught.value.body())
    assert before_and_after(rig) == before
    assert rig.is_clean()


async def upload_archive(rig: Rig, archive: Path) -> None:
    with Staging(rig.store).open() as staged:
        staged.unpack(archive)
        await rig.admission.admit(staged.folder, name="evil", accept_base=True, accept_no_effect=True)


# An empty folder is no harm in an archive: names are flat, and nothing of it is unpacked.
HARMLESS_PACKED = {"folder inside"}


@pytest.mark.parametrize(
    "case", [case for case in CORPUS if case.name not in HARMLESS_PACKED], ids=lambda case: case.name
)
def test_no_hostile_archive_is_served(rig: Rig, tmp_path: Path, case: BadAdapter) -> None:
    """The same files in an archive, links and pipes included."""
    folder = case.write(tmp_path / "adapter")
    with tarfile.open(tmp_path / "adapter.tar.gz", "w:gz") as archive:
        for entry in sorted(folder.iterdir()):
            archive.add(entry, entry.name)
    before = before_and_after(rig)
    with pytest.raises((AdapterRefused, StoreError)) as caught:
        run(upload_archive(rig, tmp_path / "adapter.tar.gz"))
    assert caught.value.status in (413, 422)
    assert caught.value.reasons or caught.value.status == 413
    assert before_and_after(rig) == before
    assert rig.is_clean()
