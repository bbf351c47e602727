"""``deltaserve adapters rebase``: to a relative of the base it helps there too; a stranger is told from a relative."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.cli import main
from deltaserve.model.identify import identify
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import LoraDelta
from deltaserve_trainer.base import Base, load_model, spec_of
from deltaserve_trainer.batches import collate
from deltaserve_trainer.loss import mean_loss, summed_loss
from deltaserve_trainer.merging.low_rank import Factors
from deltaserve_trainer.merging.update import LinearUpdate, Update
from deltaserve_trainer.merging.write import write_update
from deltaserve_trainer.scoring import read_rows
from deltatest.of_kind import all_of
from deltatest.trainer_base import make_base, make_tokenizer, write_pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``old``; ``next``, the same trained on a little; ``stranger`` of another seed; ``wide`` of another shape; and
    a small delta that was trained on ``old``, and its opposite."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rebase")
    make_base(folder / "old")
    model: Any = load_model(folder / "old")
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.2 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "next")
    make_tokenizer().save_pretrained(folder / "next")
    make_base(folder / "stranger", seed=9)
    make_base(folder / "wide", architecture="gpt2")
    write_pairs(folder / "held-out.jsonl", 8, seed=5)
    delta = learned(folder)
    for name, sign in (("task", 1.0), ("against", -1.0)):
        changes = {module: LinearUpdate((32, 64), Factors(a, sign * b)) for module, (a, b) in delta.items()}
        fingerprint = identify(folder / "old")
        write_update(Update(changes), folder / name, fingerprint, base_name="old", method="by hand")
    return folder


def learned(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of both down projections after a few steps on the task."""
    model: Any = load_model(folder / "old")
    rows = read_rows(write_pairs(folder / "pairs.jsonl", 16), folder / "old", max_rows=16, max_length=64)
    factors = {}
    generator = torch.Generator().manual_seed(1)
    for name, module in list(model.named_modules()):
        if name.endswith("down_proj"):
            a = (0.2 * torch.randn(4, 64, generator=generator)).requires_grad_()
            b = torch.zeros(32, 4, requires_grad=True)
            factors[name] = (a, b)
            module.register_forward_hook(lambda _, inputs, y, a=a, b=b: y + inputs[0] @ a.t() @ b.t())
    optimizer = torch.optim.Adam([tensor for pair in factors.values() for tensor in pair], lr=3e-2)
    for _ in range(25):
        loss = summed_loss(model, collate(rows, 0), "float32") / sum(row.num_trained for row in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: (a.detach(), b.detach()) for name, (a, b) in factors.items()}


def rebase(
    place: Path,
    store: Path,
    onto: str,
    *options: str,
    capsys: pytest.CaptureFixture[str],
    adapter: str = "task",
    fails: bool = False,
) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                *("adapters", "rebase", str(place / adapter), "--model", str(place / "old"), "--out", "moved"),
                *("--onto", str(place / onto), "--data", str(place / "held-out.jsonl"), "--store", str(store)),
                *options,
            ]
        )
    captured = capsys.readouterr()
    assert bool(stopped.value.code) == fails, captured.err
    assert "Traceback" not in captured.err
    return captured.err if fails else captured.out


def test_on_a_relative_the_rebased_adapter_beats_the_bare_base(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(rebase(place, tmp_path / "store", "next", "--json", capsys=capsys))
    old, new = report["losses"], report["new_losses"]
    assert old["old_adapter"] < old["old_base"] - 0.3
    assert new["new_adapter"] < new["new_base"] - 0.3
    assert report["similarity"] > 0.95
    assert report["is_near"]
    assert report["line"][0] == pytest.approx(old["old_base"], abs=1e-4)
    assert report["line"][-1] == pytest.approx(new["new_base"], abs=1e-4)
    assert report["has_same_tokens"]
    # The files are those of the new base, and what they do there is what was told.
    model = load_model(place / "next")
    stored = next((tmp_path / "store" / "versions").glob("*/adapter.json"))
    config = json.loads(stored.read_text())
    assert config["method"].startswith(f"rebase of {report['parent']} from base ")
    spec = spec_of(model, Base(place / "next", "next", config["base_fingerprint"]))
    files = tmp_path / "files"
    files.mkdir()
    for file in stored.parent.iterdir():
        if file.name != "manifest.json":
            (files / file.name).write_bytes(file.read_bytes())
    for delta in all_of(LoraDelta, read_adapter(files, spec).deltas):
        model.get_submodule(delta.module).get_parameter("weight").data += delta.b @ delta.a
    rows = read_rows(place / "held-out.jsonl", place / "next", max_rows=64, max_length=256)
    measured = mean_loss(model, rows, batch_size=8, pad_token_id=0, precision="float32")
    assert new["new_adapter"] == pytest.approx(measured, abs=1e-4)


def test_a_server_of_another_base_is_told_before_anything_is_measured(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        def version(self) -> dict[str, Any]:
            return {"base": "old", "base_fingerprint": identify(place / "old")}

    monkeypatch.setattr("deltaserve.cli.connection.find_server", lambda *_: Server())
    monkeypatch.setattr("deltaserve.cli.rebase._before", lambda *_: pytest.fail("measured"))
    told = rebase(place, tmp_path / "store", "next", fails=True, capsys=capsys)
    assert f"serves another base: old, fingerprint {identify(place / 'old')[:12]}" in told
    assert identify(place / "next")[:12] in told


def test_what_does_not_help_is_registered_only_when_that_is_accepted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a base of another seed is told from a relative."""
    store = tmp_path / "store"
    assert "Nothing was registered" in rebase(place, store, "next", adapter="against", fails=True, capsys=capsys)
    assert not list(store.glob("versions/*"))
    out = rebase(place, store, "stranger", "--accept-worse", adapter="against", capsys=capsys)
    assert "the bases are not near each other" in out
    assert len(list(store.glob("versions/*"))) == 1


@pytest.mark.parametrize(
    ("onto", "told"),
    [("wide", "the new base has another shape"), ("old", "bit for bit"), ("nowhere", "no folder with a config.json")],
)
def test_what_has_no_place_there_is_refused(
    place: Path, tmp_path: Path, onto: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in rebase(place, tmp_path / "store", onto, capsys=capsys, fails=True)
