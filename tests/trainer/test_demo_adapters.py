"""The adapters that ship with the embedded base: whole, small, of this base, and with the voice they promise."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from deltaserve.model.identify import identify
from deltaserve.tinybase import CHECKPOINT, DEMO_ADAPTERS
from deltaserve_store.formats import read_adapter
from deltaserve_trainer import demo_adapters
from deltaserve_trainer.base import Base, load_model, spec_of
from deltaserve_trainer.data import read_dataset
from deltaserve_trainer.demo_adapters import BASE_NAME, MAX_BYTES, build_demo
from deltaserve_trainer.demos import DEMOS, Demo
from deltaserve_trainer.encoding import Encoder
from deltaserve_trainer.errors import GateRefused
from deltaserve_trainer.evaluate import greedy_answer
from deltaserve_trainer.methods import load_method
from deltatest.trainer_base import make_base

FILES = {
    "lora": {"adapter_config.json", "adapter_model.safetensors"},
    "sparse": {"adapter.json", "adapter.safetensors"},
}
NUM_PROMPTS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    torch.set_num_threads(1)
    return Base(CHECKPOINT, BASE_NAME, identify(CHECKPOINT, cache_dir=tmp_path_factory.mktemp("digests")))


by_demo = partial(pytest.mark.parametrize, "demo", DEMOS, ids=lambda demo: demo.name)


@by_demo()
def test_files_belong_to_this_base_and_pass_the_door(demo: Demo, base: Base) -> None:
    folder = DEMO_ADAPTERS / demo.name
    recipe = demo.recipe()
    assert {path.name for path in folder.iterdir()} == FILES[recipe.method] | {"README.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_BYTES
    parsed = read_adapter(folder, spec_of(load_model(base.folder), base))
    assert parsed.kind == recipe.method
    assert parsed.base_name == BASE_NAME
    if recipe.sparse is not None:
        assert parsed.base_fingerprint == base.fingerprint
        assert parsed.num_parameters == recipe.sparse.num_entries
    if recipe.lora is not None:
        assert parsed.config["use_rslora"] == recipe.lora.rslora
        assert parsed.config["rank_pattern"] == recipe.lora.rank_pattern
    card = (folder / "README.md").read_text("utf-8")
    assert base.fingerprint in card
    assert f'"learning_rate": {json.dumps(recipe.learning_rate)}' in card


@by_demo()
def test_most_answers_have_the_voice_and_the_base_has_not(demo: Demo, base: Base) -> None:
    method = load_method(load_model(base.folder), DEMO_ADAPTERS / demo.name, base)
    encoder = Encoder.from_folder(base.folder, 512)
    prompts = [encoder.prompt_ids(row) for row in read_dataset(demo.eval_data).examples[:NUM_PROMPTS]]
    answers = [greedy_answer(method, encoder, prompt, 96) for prompt in prompts]
    assert sum(map(demo.shows_in, answers)) >= 0.8 * NUM_PROMPTS, answers
    with method.disabled():
        assert not any(demo.shows_in(greedy_answer(method, encoder, prompt, 24)) for prompt in prompts[:4])


def test_a_demo_without_its_voice_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_adapters, "MAX_ANSWER_TOKENS", 2)
    short = {"max_steps": 1, "eval_every": 1, "max_eval_rows": 2, "max_length": 48, "batch_size": 2}
    demo = Demo("shout", "", lambda answer: False, {**DEMOS[0].settings, **short})
    with pytest.raises(GateRefused):
        build_demo(demo, Base(make_base(tmp_path / "base"), "tiny", "0" * 64), tmp_path / "out")
    assert not (tmp_path / "out").exists()
