"""The fixture: the published size, the same bytes from the same seed, and files that the field's own readers take."""

from __future__ import annotations

import hashlib
import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltatest.fixture_of_load import TINY
from loadtest.small import Fixture, Shape, adapter_tensors, main, write


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return write(tmp_path_factory.mktemp("small"), adapters=2, ranks=[4, 8], shape=TINY)


def test_the_default_shape_has_the_published_number_of_parameters() -> None:
    shape = Shape()
    layer = sum(prod(size) for size in shape.projections().values()) + 2 * shape.hidden
    assert shape.vocab * shape.hidden + shape.layers * layer + shape.hidden == 115_640_640
    bytes_of_rank_8 = 2 * sum(8 * sum(size) for size in shape.projections().values()) * shape.layers
    assert round(bytes_of_rank_8 / 1e6, 1) == 4.9


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(made: Fixture, tmp_path: Path) -> None:
    again = write(tmp_path / "again", adapters=2, ranks=[4, 8], shape=TINY)
    assert digests(again.folder) == digests(made.folder)
    other = digests(write(tmp_path / "other", adapters=2, ranks=[4, 8], shape=TINY, seed=1).folder)
    weights = [name for name in other if name.endswith(".safetensors")]
    assert len(weights) == 5
    assert not any(other[name] == digests(made.folder)[name] for name in weights)


def test_a_second_call_adds_adapters_and_leaves_the_rest(tmp_path: Path) -> None:
    first = write(tmp_path, adapters=1, ranks=[4], shape=TINY)
    before = digests(tmp_path)
    second = write(tmp_path, adapters=2, ranks=[4, 2], shape=TINY)
    assert list(first.adapters) == ["r4-000"]
    assert list(second.adapters) == ["r4-000", "r4-001", "r2-000", "r2-001"]
    assert second.of_rank(2) == ["r2-000", "r2-001"]
    after = digests(tmp_path)
    assert all(after[name] == digest for name, digest in before.items() if name != "fixture.json")
    with pytest.raises(ValueError, match="another seed or shape"):
        write(tmp_path, adapters=1, ranks=[4], shape=TINY, seed=9)


def test_transformers_reads_the_base_and_its_answers_are_text(made: Fixture) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    assert len(tokenizer) == TINY.vocab == model.config.vocab_size
    low, high = made.plain_tokens
    assert all(tokenizer.decode([i]).strip().isalpha() and tokenizer.decode([i]).isascii() for i in range(low, high))
    text = "hello there world"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = torch.randint(low, high, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    assert all(0.01 < h.pow(2).mean().sqrt() < 10 for h in out.hidden_states)
    chosen = out.logits.argmax(-1)
    assert ((chosen >= low) & (chosen < high)).all()
    assert chosen.unique().numel() > 8  # no single token wins everywhere


def test_peft_reads_the_adapters_and_each_changes_the_answer_in_its_own_way(made: Fixture) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    ids = torch.randint(*made.plain_tokens, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [model(ids).logits]
        for name, (rank, folder) in made.adapters.items():
            tensors = load_file(folder / "adapter_model.safetensors")
            assert len(tensors) == 2 * 7 * TINY.layers
            assert all((tensor != 0).any() for tensor in tensors.values())
            assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {rank}
            adapted = PeftModel.from_pretrained(model, folder, adapter_name=name).eval()
            found.append(adapted(ids).logits)
            model = adapted.unload()
    for index, one in enumerate(found):
        for other in found[:index]:
            assert (one - other).abs().max() > 0.05


def test_adapters_of_different_numbers_and_ranks_share_nothing() -> None:
    one, other = (adapter_tensors(TINY, 4, seed) for seed in (1, 2))
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no fixture"):
        Fixture.read(tmp_path)
    (tmp_path / "fixture.json").write_text(json.dumps({"adapters": 3}))
    with pytest.raises(ValueError, match="holds no fixture"):
        Fixture.read(tmp_path)


def test_the_command_line_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "f"), "--adapters", "1", "--rank", "2", "--layers", "1"]) == 0
    assert Fixture.read(tmp_path / "f").of_rank(2) == ["r2-000"]
    assert "1 adapters" in capsys.readouterr().out
