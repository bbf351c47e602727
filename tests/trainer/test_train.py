"""A run from data to directory: loss, resume, signals, pictures, evaluation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from deltaserve_trainer.base import Base, load_model
from deltaserve_trainer.batches import collate, plan_epoch
from deltaserve_trainer.checkpoint import newest_checkpoint
from deltaserve_trainer.encoding import EncodedExample
from deltaserve_trainer.errors import DataInvalid, ResumeRefused, TrainingDiverged, TrainingInterrupted
from deltaserve_trainer.evaluate import evaluate_adapter
from deltaserve_trainer.interrupt import StopSignals
from deltaserve_trainer.loop import learning_rate_at, train_batch
from deltaserve_trainer.loss import mean_loss
from deltaserve_trainer.progress import Progress
from deltaserve_trainer.recipe import Recipe, resolve_recipe
from deltaserve_trainer.train import TrainingResult, run_training
from deltatest.trainer_base import make_base, write_pairs, write_texts

SMALL: dict[str, Any] = {
    "max_steps": 12,
    "eval_every": 4,
    "checkpoint_every": 5,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "held_out_fraction": 0.2,
}
LORA: dict[str, Any] = {**SMALL, "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}}
SPARSE: dict[str, Any] = {**SMALL, "method": "sparse", "sparse": {"num_entries": 300, "selection_steps": 2}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    make_base(folder / "base")
    write_pairs(folder / "pairs.jsonl", 40)
    write_texts(folder / "texts.jsonl", 6)
    return folder


def _base(files: Path) -> Base:
    return Base(files / "base", "tiny/base", "cd" * 32)


def _run(files: Path, out: Path, overrides: dict[str, Any], **options: Any) -> TrainingResult:
    return run_training(
        resolve_recipe("quick", overrides),
        base=_base(files),
        data=files / "pairs.jsonl",
        general_data=files / "texts.jsonl",
        out_dir=out,
        **options,
    )


def _row(ids: list[int], trained: list[bool]) -> EncodedExample:
    return EncodedExample(1, tuple(ids), tuple(trained), False)


def _metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def _stop_at(step: int, number: int) -> Callable[[Progress], None]:
    """A progress callback that sends this process a signal once."""
    sent: list[int] = []

    def on_progress(progress: Progress) -> None:
        if progress.phase == "training" and progress.step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)

    return on_progress


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200), size=st.integers(1, 9), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_row_once_and_is_repeatable(lengths: list[int], size: int, epoch: int) -> None:
    batches = plan_epoch(lengths, size, 3, epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size for batch in batches)
    assert len(batches) == math.ceil(len(lengths) / size)
    assert batches == plan_epoch(lengths, size, 3, epoch)


def test_length_grouping_pads_less_than_chance() -> None:
    lengths = torch.randint(5, 100, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = plan_epoch(lengths, 8, 0, 0)
    padded = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches)
    unsorted = sum(max(lengths[i : i + 8]) * 8 for i in range(0, 640, 8))
    assert padded < 1.1 * sum(lengths) < unsorted
    assert batches != plan_epoch(lengths, 8, 0, 1)


def test_masked_loss_equals_a_sum_by_hand(files: Path) -> None:
    model = load_model(files / "base")
    rows = [
        _row([10, 11, 12, 13, 14], [False, False, True, True, False]),
        _row([20, 21], [False, True]),
        _row([30, 31, 32, 33, 34, 35, 36], [True] * 7),
    ]
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position in range(1, len(row.input_ids)):
            if row.trained[position]:
                total -= float(logprobs[position - 1, row.input_ids[position]])
                count += 1
    assert count == 2 + 1 + 6
    options: dict[str, Any] = {"pad_token_id": 0, "precision": "float32"}
    for size in (1, 2, 3):
        assert mean_loss(model, rows, batch_size=size, **options) == pytest.approx(total / count, rel=1e-5)
    changed = [replace(rows[0], input_ids=(99, 98, 12, 13, 97)), *rows[1:]]
    assert collate(changed, 0).labels[0].tolist() == [-100, -100, 12, 13, -100, -100, -100]


def test_micro_batches_give_the_gradient_of_the_whole_batch(files: Path) -> None:
    rows = [_row(list(range(10, 13 + 2 * i)), [False] + [True] * (2 + 2 * i)) for i in range(4)]
    grads = []
    for micro in (None, 1, 3):
        model = load_model(files / "base")
        weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_(True)
        recipe = resolve_recipe("quick", {"micro_batch_size": micro})
        loss, tokens = train_batch(model, rows, recipe, 0)
        assert weight.grad is not None
        grads.append((loss, tokens, weight.grad))
    for loss, tokens, grad in grads[1:]:
        assert loss == pytest.approx(grads[0][0], rel=1e-5)
        assert tokens == grads[0][1]
        torch.testing.assert_close(grad, grads[0][2], rtol=1e-4, atol=1e-7)


def test_learning_rate_warms_up_and_decays_linearly() -> None:
    recipe = resolve_recipe("quick", {"learning_rate": 1.0, "warmup_fraction": 0.2})
    rates = [learning_rate_at(recipe, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])


@pytest.mark.parametrize("overrides", [LORA, SPARSE], ids=["lora", "sparse"])
@pytest.mark.parametrize("step", [3, 8])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    files: Path, tmp_path: Path, overrides: dict[str, Any], step: int
) -> None:
    whole = _run(files, tmp_path / "whole", overrides)
    with pytest.raises(TrainingInterrupted) as caught:
        _run(files, tmp_path / "parts", overrides, on_progress=_stop_at(step, signal.SIGTERM))
    assert caught.value.exit_code == 143
    assert caught.value.step == step
    assert not (tmp_path / "parts" / "manifest.json").exists()
    if step == 8:  # and once more from an older state, as after a kill
        for path in (tmp_path / "parts" / "checkpoints").glob("step-00000008"):
            shutil.rmtree(path)
    parts = _run(files, tmp_path / "parts", overrides, resume=True)
    for folder in ("best", "last"):
        for path in (tmp_path / "whole" / folder).glob("*.safetensors"):
            expected, found = load_file(path), load_file(tmp_path / "parts" / folder / path.name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert parts.evaluation == whole.evaluation
    keys = ("step", "loss", "learning_rate", "gradient_norm", "eval_loss", "general_loss")
    left, right = ([[row.get(key) for key in keys] for row in _metrics(tmp_path / n)] for n in ("whole", "parts"))
    assert left == right


def test_a_damaged_checkpoint_is_passed_over(files: Path, tmp_path: Path) -> None:
    _run(files, tmp_path / "run", LORA)
    folder = tmp_path / "run" / "checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000010", "step-00000012"]
    (folder / names[1] / "state.safetensors").write_bytes(b"cut short")
    found = newest_checkpoint(folder)
    assert found is not None
    assert found.counters.step == 10
    assert not any(path.suffix in (".pt", ".bin", ".pth", ".pkl") for path in (tmp_path / "run").rglob("*"))


def test_another_recipe_base_or_directory_is_not_resumed(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _run(files, out, LORA)
    with pytest.raises(ResumeRefused, match="--resume"):
        _run(files, out, LORA)
    with pytest.raises(ResumeRefused, match="recipe changed"):
        _run(files, out, {**LORA, "learning_rate": 2e-2}, resume=True)
    again = _run(files, out, LORA, resume=True)
    assert again.num_steps == 12
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("x")
    with pytest.raises(ResumeRefused, match="other files"):
        _run(files, other, LORA)


@pytest.mark.parametrize("overrides", [LORA, SPARSE], ids=["lora", "sparse"])
def test_run_directory_keeps_its_contract(files: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    seen: list[Progress] = []
    result = _run(files, tmp_path / "run", overrides, on_progress=seen.append)
    out = tmp_path / "run"
    assert Recipe.model_validate_json((out / "recipe.json").read_text("utf-8")) == result.recipe
    names = {
        "lora": {"adapter_config.json", "adapter_model.safetensors"},
        "sparse": {"adapter.json", "adapter.safetensors"},
    }
    assert {path.name for path in (out / "best").iterdir()} == names[result.recipe.method] | {"README.md"}
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))["files"]
    for name, digest in manifest.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert {
        "recipe.json",
        "metrics.jsonl",
        "loss.png",
        "evaluation.json",
        "data.json",
        "best/README.md",
    } <= manifest.keys()
    assert result.evaluation.gain > 0.3
    assert result.evaluation.num_general_rows == 6
    card = (out / "best" / "README.md").read_text("utf-8")
    for part in (
        "tiny/base",
        "cd" * 32,
        f"{result.evaluation.adapter_target:.4f}",
        f"{result.evaluation.base_general:.4f}",
    ):
        assert part in card
    assert str(files) not in card
    steps = [progress.step for progress in seen if progress.phase == "training" and progress.loss is not None]
    assert steps == list(range(1, 13))
    assert seen[-1].tokens_per_second > 0
    assert any(progress.phase == "selecting" for progress in seen) == (result.recipe.method == "sparse")
    best = min((row for row in _metrics(out) if "eval_loss" in row), key=lambda row: row["eval_loss"])
    assert result.best_step == best["step"]
    assert result.evaluation.adapter_target == pytest.approx(best["eval_loss"], rel=1e-5)


def test_the_picture_shows_curves(files: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    result = _run(files, tmp_path / "run", LORA)
    picture = imread(result.plot)
    assert picture.shape[0] > 400
    assert picture.shape[1] > 600
    colours = {tuple(int(255 * c) for c in pixel[:3]) for pixel in picture.reshape(-1, picture.shape[2])[::7]}
    assert len(colours) > 20
    for curve in ((200, 85, 61), (88, 129, 87), (47, 93, 148)):
        assert any(all(abs(a - b) <= 3 for a, b in zip(curve, colour, strict=True)) for colour in colours), curve


def test_the_best_state_is_kept_when_the_run_gets_worse(files: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"  # answers that begin like those trained on and end differently
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text("utf-8").splitlines()[:8]]
    other.write_text("".join(json.dumps({**row, "completion": " the small birds"}) + "\n" for row in rows), "utf-8")
    overrides = {**LORA, "max_steps": 60, "eval_every": 1, "patience": 6}
    result = _run(files, tmp_path / "run", overrides, eval_data=other)
    losses = {row["step"]: row["eval_loss"] for row in _metrics(tmp_path / "run") if "eval_loss" in row}
    assert 0 < result.best_step < 54
    assert result.num_steps == result.best_step + 6
    assert result.evaluation.adapter_target == pytest.approx(min(losses.values()), rel=1e-4)
    assert losses[result.num_steps] > losses[result.best_step]


def test_a_diverging_run_stops_with_a_reason(files: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="lower learning_rate"):
        _run(files, tmp_path / "run", {**SPARSE, "learning_rate": 1e30, "max_grad_norm": 1e30})
    assert not (tmp_path / "run" / "best").exists()


def test_half_precision_files_are_evaluated_as_saved(files: Path, tmp_path: Path) -> None:
    result = _run(files, tmp_path / "run", {**LORA, "save_dtype": "bfloat16"})
    tensors = load_file(result.adapter_folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    held_out = [row for row in _metrics(tmp_path / "run") if "eval_loss" in row]
    assert result.evaluation.adapter_target != min(row["eval_loss"] for row in held_out)


def test_adapters_are_measured_from_their_files(files: Path, tmp_path: Path) -> None:
    result = _run(files, tmp_path / "run", LORA, eval_data=files / "pairs.jsonl")
    found = evaluate_adapter(
        _base(files), result.adapter_folder, files / "pairs.jsonl", general_data=files / "texts.jsonl"
    )
    expected = result.evaluation
    assert found.num_target_rows == 40
    assert found.adapter_target == pytest.approx(expected.adapter_target, rel=1e-5)
    assert found.base_general == pytest.approx(expected.base_general, rel=1e-5)
    assert [sample.adapter for sample in found.samples] == [sample.adapter for sample in expected.samples]


def test_bad_data_leaves_no_run(files: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "ok"}\n{"txt": "typo"}\n', "utf-8")
    with pytest.raises(DataInvalid, match="line 2"):
        run_training(resolve_recipe("quick"), base=_base(files), data=bad, out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _interrupt_and_wait() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            _interrupt_and_wait()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_leaves_a_resumable_run(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    script = textwrap.dedent(
        f"""
        import sys, torch
        torch.set_num_threads(1)
        from pathlib import Path
        from deltaserve_trainer.base import Base
        from deltaserve_trainer.errors import TrainingInterrupted
        from deltaserve_trainer.recipe import resolve_recipe
        from deltaserve_trainer.train import run_training
        files = Path({str(files)!r})
        try:
            run_training(
                resolve_recipe("quick", {LORA | {"max_steps": 4000, "eval_every": 4000}!r}),
                base=Base(files / "base", "tiny/base", "cd" * 32),
                data=files / "pairs.jsonl",
                out_dir=Path({str(out)!r}),
                on_progress=lambda p: print(p.step, flush=True),
            )
        except TrainingInterrupted as stopped:
            sys.exit(stopped.exit_code)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    if process.stdout is None:
        pytest.fail("no pipe")
    for line in process.stdout:
        if int(line) >= 7:
            break
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(timeout=60) == 130
    checkpoint = newest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    assert 7 <= checkpoint.counters.step < 4000
    with pytest.raises(TrainingInterrupted) as caught:
        run_training(
            resolve_recipe("quick", LORA | {"max_steps": 4000, "eval_every": 4000}),
            base=_base(files),
            data=files / "pairs.jsonl",
            out_dir=out,
            resume=True,
            on_progress=_stop_at(checkpoint.counters.step + 3, signal.SIGINT),
        )
    assert caught.value.step == checkpoint.counters.step + 3
    assert [row["step"] for row in _metrics(out)] == list(range(caught.value.step + 1))
