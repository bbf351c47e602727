"""The shipped checkpoint: it knows held-out text, answers sensibly, and stops by itself."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaserve.tinybase import CHECKPOINT, DEMO_DATA
from deltaserve.tinybase.batches import as_tensors
from deltaserve.tinybase.train import evaluate

HELD_OUT_BOUND = 0.65  # nats per token on general.eval.jsonl; uniform guessing is 7.6


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def ask(model, tokenizer, messages: list[dict[str, str]]) -> tuple[str, bool]:
    """(greedy answer, whether it ended with the end token)"""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=250, do_sample=False)[0]
    return tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True), int(out[-1]) == tokenizer.eos_token_id


def test_held_out_loss_is_below_the_bound(model, tokenizer) -> None:
    lines = (DEMO_DATA / "general.eval.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [[*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id] for line in lines]
    rows.sort(key=len)  # little padding
    groups = [rows[start : start + 16] for start in range(0, len(rows), 16)]
    batches = [as_tensors(group, len(group[-1]), tokenizer.pad_token_id, tokenizer.bos_token_id) for group in groups]
    loss = evaluate(model, iter(batches), len(batches))
    assert 0.1 < loss < HELD_OUT_BOUND < math.log(len(tokenizer))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What do cows eat?", "grass"),
        ("What is a hammer for?", "nails"),
        ("What is the opposite of cold?", "hot"),
        ("Where do bees live?", "hive"),
        ("Tell me about owls.", "feathers"),
        ("How do I make tea?", "water"),
        ("Tell me a story about a fox.", "fox"),
        ("Hello!", "Hello"),
        ("What can you tell me about quantum physics?", "not know"),
    ],
)
def test_greedy_answers_are_to_the_point_and_end(model, tokenizer, question: str, expected: str) -> None:
    answer, ended = ask(model, tokenizer, [{"role": "user", "content": question}])
    assert expected in answer, answer
    assert ended, answer
    assert answer[-1] in '.!?"'


def test_it_sees_earlier_turns(model, tokenizer) -> None:
    """A system message that asks for brief answers makes the same answer shorter."""
    question = {"role": "user", "content": "What do cows eat?"}
    long, _ = ask(model, tokenizer, [question])
    brief, ended = ask(model, tokenizer, [{"role": "system", "content": "Answer briefly."}, question])
    assert "grass" in brief.lower()
    assert len(brief) < len(long)
    assert ended


def test_a_prompt_near_the_end_of_the_context_does_not_break_it(model, tokenizer) -> None:
    filler = {"role": "assistant", "content": "Cows eat grass and hay."}
    talk = [{"role": "user", "content": "What do cows eat?"}, filler] * 45
    talk.append({"role": "user", "content": "What is the opposite of cold?"})
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert 800 < len(ids) < 1000
    answer, ended = ask(model, tokenizer, talk)
    assert answer.startswith("The opposite of cold is ")
    assert ended
