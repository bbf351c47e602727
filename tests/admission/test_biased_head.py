"""Added tokens on a base whose head has a bias (Phi): those it has numbers for are served, others are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deltaserve.errors import AdapterRefused
from deltatest.grown_adapters import ADDED, make_grown
from deltatest.peft_adapters import edit_tensors, peft_greedy
from deltatest.runtime_factory import BASE_NAME, open_runtime
from deltatest.tiny_models import save_random, tiny_config
from deltatest.tokenizers import byte_level

NUM_ROOM = 47
"""Rows of no token: with the three added ones, and resized to a multiple of 64, the matrices stay as they are."""


def make_base(folder: Path, room: int) -> tuple[Path, Any]:
    config = tiny_config(
        "phi", num_key_value_heads=4, partial_rotary_factor=0.5, vocab_size=byte_level().vocab_size + room
    )
    base = save_random(config, folder)
    byte_level()._hf.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
            matrix.weight[byte_level().vocab_size + len(ADDED) :] = 0  # as ``make_grown`` leaves rows of no token
    model.save_pretrained(base)
    return base, model


def test_tokens_that_it_has_room_for_are_served_as_peft_does(tmp_path: Path) -> None:
    base, model = make_base(tmp_path / "base", NUM_ROOM)
    grown = make_grown("trained-padded", model, byte_level()._hf, tmp_path / "a", base_name=BASE_NAME)
    assert torch.equal(grown.model.lm_head.bias, model.lm_head.bias)
    copies = [name for name in load_file(grown.folder / "adapter_model.safetensors") if "base_layer" in name]
    edit_tensors(grown.folder, dict.fromkeys(copies))
    ids = (5, grown.ids[0], 17, 60, grown.ids[1], 44)

    async def answer() -> list[int]:
        async with open_runtime(base, tmp_path / "store", tokenizer_conflicts=lambda tokens: []) as runtime:
            result = await runtime.admit(grown.folder, "a")
            assert result.evidence.max_error <= result.evidence.tolerance
            return (await runtime.generate("a", ids, 16)).token_ids

    found = asyncio.run(answer())
    assert found == peft_greedy(grown.model, grown.folder, ids, 16)
    assert set(found) & set(grown.ids), "no added token is answered: the test shows less than it says"


@pytest.mark.parametrize("kind", ["trained", "copied"])
def test_tokens_beyond_it_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    """The proof took the base's narrower bias for that of the wider logits, and fell."""
    base, model = make_base(tmp_path / "base", room=1)
    grown = make_grown(kind, model, byte_level()._hf, tmp_path / "a", base_name=BASE_NAME)

    async def upload() -> None:
        async with open_runtime(base, tmp_path / "store", tokenizer_conflicts=lambda tokens: []) as runtime:
            await runtime.admit(grown.folder, "a")

    with pytest.raises(AdapterRefused) as refused:
        asyncio.run(upload())
    reason = next(reason for reason in refused.value.reasons if reason.where == "lm_head")
    assert (reason.code, "at most 1" in reason.allowed) == ("added_tokens", True)
    assert f"{len(ADDED)} added tokens, 2 beyond" in reason.found
