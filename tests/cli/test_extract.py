"""``deltaserve adapters extract``: a tuned copy of a tiny base comes back as an adapter, within its bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltaserve.cli import main
from deltaserve.model.base import load_base
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import LoraDelta, SparseDelta
from deltaserve_store.vector_deltas import NormDelta
from deltaserve_trainer.base import load_model
from deltatest.trainer_base import make_base, write_texts

PROMPT = [7, 40, 120, 9, 200, 33, 61]
BUDGET = 16_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base; a copy with low-rank changes in one layer, peaks in the other, other norms and embeddings."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("extract")
    make_base(folder / "base")
    model: Any = load_model(folder / "base")
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers.0" in name:
            rows, columns = module.weight.shape
            fading = 0.6 ** torch.arange(12.0)
            module.weight.data += 0.2 * (drawn(rows, 12) * fading) @ drawn(12, columns)
        elif isinstance(module, torch.nn.Linear) and "layers.1" in name:
            peaks = torch.rand(module.weight.shape, generator=generator) < 0.02
            module.weight.data += 0.5 * drawn(*module.weight.shape) * peaks
        elif "norm" in name:
            module.weight.data += 0.01 * drawn(len(module.weight))
    model.model.embed_tokens.weight.data[5] += 0.01
    model.save_pretrained(folder / "tuned")
    write_texts(folder / "text.jsonl", 14)
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> dict[str, Any]:
    """The command's own JSON; its files are in ``place / "run"``."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main_without_exit(
            *("extract", "--base", place / "base", "--tuned", place / "tuned", "--budget", BUDGET, "--out", "small"),
            *("--text", place / "text.jsonl", "--max-rows", 8, "--run-dir", place / "run", "--store", place / "store"),
            "--json",
        )
    return json.loads(out.getvalue())


def main_without_exit(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["adapters", *map(str, arguments)])
    assert not stopped.value.code


def test_the_divergence_falls_with_the_budget_and_the_budget_is_kept(done: dict[str, Any], place: Path) -> None:
    curve = [point for point in done["points"] if point["forms"] == "all forms"]
    assert len(curve) >= 3
    # The smallest holds so little of a model of random weights that it may be no nearer than nothing.
    divergences = [done["base_divergence"], *(point["divergence"] for point in curve[1:])]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < 0.1 * divergences[0]
    assert [point["kept"] for point in curve] == sorted(point["kept"] for point in curve)
    assert all(point["num_bytes"] <= point["budget"] for point in done["points"])
    files = [file.stat().st_size for file in (place / "run" / "adapter").iterdir()]
    assert sum(files) == curve[-1]["num_bytes"] <= BUDGET
    assert curve[-1]["num_bytes"] > 0.8 * BUDGET, "most of the budget is used"
    assert done["adapter"]["bytes"] == curve[-1]["num_bytes"]


def test_the_served_adapter_is_the_approximation_that_was_told(done: dict[str, Any], place: Path) -> None:
    """Fold the files by hand into a plain model: its KL from the fine-tune is the one that the engine had."""
    base = load_base(place / "base", dtype=torch.float32)
    parsed = read_adapter(place / "run" / "adapter", base.spec)
    assert parsed.kinds == ("lora", "sparse", "vector")
    assert set(done["adapter"]["kinds"]) == {"lora", "sparse", "vector"}
    folded, tuned = load_model(place / "base"), load_model(place / "tuned")
    plain = {name: parameter.clone() for name, parameter in folded.named_parameters()}
    for delta in parsed.deltas:
        weight = folded.get_submodule(delta.module).get_parameter("weight").data
        if isinstance(delta, LoraDelta):
            weight += delta.b.float() @ delta.a.float()
        elif isinstance(delta, SparseDelta):
            weight[delta.rows.long(), delta.cols.long()] += delta.values.float()
        else:
            assert isinstance(delta, NormDelta)
            assert delta.gain is not None
            weight += delta.gain
            torch.testing.assert_close(weight, tuned.get_submodule(delta.module).get_parameter("weight").data)
    for row in done["rows"]:
        key = f"{row['module']}.weight"
        meant = (tuned.get_parameter(key) - plain[key]).double()
        left = (tuned.get_parameter(key) - folded.get_parameter(key)).double()
        assert row["error"] == pytest.approx(float(left.norm() / meant.norm()), abs=1e-5)
    from deltaserve_trainer.scoring import divergence, model_logits, read_rows

    rows = read_rows(place / "text.jsonl", place / "base", max_rows=8, max_length=256)
    prompts = [row.input_ids for row in rows]
    expected = divergence(model_logits(tuned, prompts), model_logits(folded, prompts))
    final = [point for point in done["points"] if point["forms"] == "all forms"][-1]
    assert final["divergence"] == pytest.approx(expected, rel=1e-3, abs=1e-8)


def test_each_layer_got_the_form_that_suits_it(done: dict[str, Any]) -> None:
    forms = {row["module"]: row["form"] for row in done["rows"]}
    assert {form for module, form in forms.items() if "layers.0" in module} == {"mixed precision"}
    assert {form for module, form in forms.items() if "layers.1" in module} == {"sparse"}
    alone = {point["forms"]: point["divergence"] for point in done["points"] if point["budget"] == BUDGET}
    assert alone["all forms"] < min(value for form, value in alone.items() if form != "all forms")
    assert alone["mixed precision"] < alone["low rank"]
    assert {"signs", "dense"} < set(alone)
    assert done["num_calibration_tokens"] > 50


def test_what_is_not_carried_is_told_and_provenance_is_kept(done: dict[str, Any], place: Path) -> None:
    assert list(done["not_carried"]) == ["model.embed_tokens.weight"]
    config = json.loads((place / "run" / "adapter" / "adapter.json").read_text())
    told = r"extract of tuned in float16, errors of outputs, all forms, [01]\.\d{4} of the squares kept"
    assert re.fullmatch(told, config["method"])
    assert (place / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((place / "run" / "extract.json").read_text())["points"] == done["points"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--budget", "100"], "the least is"),
        (["--budget", "lots"], "512MB"),
        (["--tuned", "nowhere"], "--tuned nowhere: no folder with a config.json"),
        (["--base", "nowhere"], "--base nowhere: no folder with a config.json"),
        (["--dtype", "int4"], "choose one of float16"),
        (["--measure", "answers"], "choose one of outputs, weights"),
        (["--measure", "weights", "--calibration", "text.jsonl"], "no part in --measure weights"),
        (["--calibration", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--run-dir", "base"], "holds files already"),
        (["--out", "a/b"], "not a valid name"),
        (["--max-rows", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(
    place: Path,
    tmp_path: Path,
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    given = {"--base": "base", "--tuned": "tuned", "--budget": "60KB", "--out": "x", "--text": "text.jsonl"}
    given |= {"--run-dir": str(tmp_path / "run"), "--store": str(tmp_path / "store")}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(SystemExit) as stopped:
        main(["adapters", "extract", *(word for pair in given.items() for word in pair)])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert not list((tmp_path / "store").glob("versions/*"))


def test_without_matplotlib_nothing_is_begun(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("deltaserve.cli.extract.find_spec", lambda name: None if name == "matplotlib" else name)
    given = ("--base", place / "base", "--tuned", place / "tuned", "--budget", BUDGET, "--out", "x")
    at = ("--run-dir", tmp_path / "run", "--store", tmp_path / "store")
    with pytest.raises(SystemExit) as stopped:
        main(["adapters", "extract", *map(str, (*given, *at))])
    assert stopped.value.code == 1
    assert "pip install 'deltaserve[train]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_the_door_refuses_leaves_all_that_was_measured(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name is the base's own. The work was done, and a second run is not needed to see it."""
    given = ("--base", place / "base", "--tuned", place / "tuned", "--budget", BUDGET, "--out", "base")
    at = ("--text", place / "text.jsonl", "--max-rows", 2, "--run-dir", tmp_path / "run", "--store", tmp_path / "store")
    with pytest.raises(SystemExit) as stopped:
        main(["adapters", "extract", *map(str, (*given, *at))])
    assert stopped.value.code == 1
    assert "is a name of the base" in capsys.readouterr().err
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept == {"adapter", "extract.json", "curve.png"}
