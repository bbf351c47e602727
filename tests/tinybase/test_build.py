"""Packing, training and the whole build on a model that is trained in seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.tinybase.batches import IGNORED, as_tensors, pack
from deltaserve.tinybase.build import build
from deltaserve.tinybase.train import Plan, Size

torch.set_num_threads(1)
SMALL = Size(hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, context=1024)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=40), st.integers(0, 1000))
def test_packing_loses_no_document_and_splits_none(lengths: list[int], seed: int) -> None:
    pieces = [[number] * length for number, length in enumerate(lengths)]
    rows = pack(pieces, 32, Random(seed))
    assert all(len(row) <= 32 for row in rows)
    found = sorted(token for row in rows for token in row)
    assert found == sorted(token for piece in pieces for token in piece)
    for row in rows:  # a document stands in one piece
        changes = sum(one != two for one, two in pairwise(row))
        assert changes == len(set(row)) - 1


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="33 tokens"):
        pack([[1] * 33], 32, Random(0))


def test_padding_and_the_next_documents_start_are_not_targets() -> None:
    inputs, targets = as_tensors([[1, 7, 2, 1, 8, 2]], 8, pad=0, bos=1)
    assert inputs.tolist() == [[1, 7, 2, 1, 8, 2, 0, 0]]
    assert targets.tolist() == [[7, 2, IGNORED, 8, 2, IGNORED, IGNORED, IGNORED]]


def test_a_plan_is_bounded_by_steps_or_by_minutes() -> None:
    for wrong in ({}, {"steps": 3, "minutes": 1.0}):
        with pytest.raises(ValueError, match="either"):
            Plan(**wrong)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("build") / "checkpoint"
    plan = Plan(steps=40, learning_rate=1e-2, warmup_steps=5, bf16=False, compile=False)
    outcome, measured = build(
        out,
        plan,
        size=SMALL,
        batch_tokens=1024,
        tokenizer_texts=300,
        vocab_size=512,
        heldout_batches=2,
        sample_tokens=3,
    )
    return out, outcome, measured


def test_the_loss_goes_down(built) -> None:
    _, outcome, measured = built
    assert outcome.steps == 40
    assert outcome.tokens > 20_000
    first, last = sum(outcome.losses[:3]) / 3, sum(outcome.losses[-5:]) / 5
    assert first > 5.5
    assert last < first - 0.6
    assert measured.heldout_loss < first - 0.6


def test_the_folder_is_an_ordinary_checkpoint(built) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _, measured = built
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert len(tokenizer) == model.config.vocab_size == 512
    assert sum(weight.numel() for weight in model.parameters()) == measured.parameters
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert model(torch.tensor([ids])).logits.isfinite().all()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"{measured.heldout_loss:.4f} nats" in card
    assert "license: apache-2.0" in card
    assert not list(out.parent.glob(".building-*"))


def test_an_existing_checkpoint_is_not_overwritten(built) -> None:
    out, _, _ = built
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="not empty"):
        build(out, Plan(steps=1))
    assert (out / "model.safetensors").read_bytes() == before


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, deltaserve.tinybase as t; print(t.CHECKPOINT.name, 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["checkpoint", "False"]


def test_nothing_in_the_package_is_too_large_for_git() -> None:
    from deltaserve.tinybase import CHECKPOINT

    sizes = {file: file.stat().st_size for file in CHECKPOINT.parent.rglob("*") if "__pycache__" not in file.parts}
    assert sum(sizes.values()) < 12 * 2**20
    assert sum(size for file, size in sizes.items() if CHECKPOINT in file.parents) < 8.5 * 2**20
    assert json.loads((Path(CHECKPOINT) / "config.json").read_text())["model_type"] == "llama"
