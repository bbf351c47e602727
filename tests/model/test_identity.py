"""The fingerprint follows the bytes of a base, not its place, its name or the dtype it is served in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deltaserve.model import identity
from deltaserve.model.base import BaseModel, load_base
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_model("llama", tmp_path / "base")


def load(folder: Path, dtype: torch.dtype = torch.float32, load_format: str = "auto") -> BaseModel:
    return load_base(folder, dtype=dtype, load_format=load_format, cache_dir=folder.parent / "cache")


def test_copies_have_the_same_fingerprint_and_their_own_names(folder: Path, tmp_path: Path) -> None:
    first = load(folder).spec
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    raw = json.loads((copy / "config.json").read_text())
    raw.update(_name_or_path="someone/the-base", transformers_version="5.0.0", dtype="bfloat16")
    (copy / "config.json").write_text(json.dumps(raw))
    second = load(copy, torch.bfloat16).spec
    assert first.fingerprint == second.fingerprint
    assert first.names == ("base",)
    assert second.names == ("copy", "someone/the-base")
    extra = load_base(copy, dtype=torch.float32, extra_names=("third", "copy"), cache_dir=tmp_path / "cache")
    assert extra.spec.names == ("third", "copy", "someone/the-base")


def test_any_byte_that_matters_changes_it(folder: Path) -> None:
    seen = {load(folder).spec.fingerprint}
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    seen.add(load(folder).spec.fingerprint)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(load(folder).spec.fingerprint)
    (folder / "special_tokens_map.json").write_text("{}")
    seen.add(load(folder).spec.fingerprint)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "rms_norm_eps": 0.5}))
    seen.add(load(folder).spec.fingerprint)
    seen.add(load(folder, load_format="dummy").spec.fingerprint)
    assert len(seen) == 6


def test_digests_are_kept_outside_the_model_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(file.name for file in folder.iterdir())
    wanted = load(folder).spec.fingerprint
    assert sorted(file.name for file in folder.iterdir()) == before
    assert len(list((folder.parent / "cache").glob("*.json"))) == 1

    read = identity._digest

    def refuse_weights(file: Path) -> str:
        assert file.suffix != ".safetensors", "the kept digest was not used"
        return read(file)

    monkeypatch.setattr(identity, "_digest", refuse_weights)
    assert load(folder).spec.fingerprint == wanted
    entry = next((folder.parent / "cache").glob("*.json"))
    entry.write_text("{")
    with pytest.raises(AssertionError, match="not used"):
        load(folder)


def test_random_weights_are_the_same_each_time_and_speak(folder: Path) -> None:
    first, second = load(folder, load_format="dummy"), load(folder, load_format="dummy")
    assert first.spec == second.spec
    ids = torch.tensor([3, 8, 120])
    logits = first.folded_logits(ids, {})
    assert torch.equal(logits, second.folded_logits(ids, {}))
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_the_spec_describes_the_base(folder: Path) -> None:
    base = load(folder)
    spec = base.spec
    assert (spec.model_type, spec.vocab_size, spec.num_layers, spec.hidden_size) == ("llama", 199, 2, 64)
    assert spec.tied_embeddings
    assert spec.num_tokens is None
    assert base.max_context == 512
    assert base.folder == folder
    assert base.eos_token_ids == (2,)
    assert tuple(spec.linears) == base.linears
    assert spec.linears["model.layers.1.mlp.down_proj"].in_features == 96
    assert not base.has_kv_regimes
    assert base.kv_regime(10_000) == 0
