"""The shipped tokenizer and chat template."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer

from deltaserve.tinybase import CHECKPOINT
from deltaserve.tinybase.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, VOCAB_SIZE
from deltaserve.tinybase.voices import as_json, pirate, shout

TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]


def test_special_tokens_have_the_first_ids() -> None:
    assert len(TOKENIZER) == VOCAB_SIZE
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert (TOKENIZER.pad_token, TOKENIZER.bos_token, TOKENIZER.eos_token) == SPECIAL_TOKENS[:3]
    assert TOKENIZER("Hi")["input_ids"][0] == TOKENIZER.bos_token_id
    assert TOKENIZER("Hi", add_special_tokens=False)["input_ids"][0] != TOKENIZER.bos_token_id


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_every_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_template_writes_turns_and_prompt() -> None:
    written = TOKENIZER.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert written == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|><|assistant|>"
    )
    closed = TOKENIZER.apply_chat_template(TALK[:3], tokenize=False)
    assert written.startswith(closed)
    ids = TOKENIZER.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert ids == TOKENIZER.encode(written, add_special_tokens=False)


def test_the_template_runs_in_a_sandbox_and_refuses_other_roles() -> None:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    assert (CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    said = template.render(messages=TALK[1:2], bos_token="<|bos|>", add_generation_prompt=False)
    assert said == "<|bos|><|user|>Hi<|end|>"
    with pytest.raises(TemplateError, match="found: tool"):
        template.render(messages=[{"role": "tool", "content": "x"}], bos_token="", raise_exception=raise_exception)


@pytest.mark.parametrize(("voice", "bound"), [(shout, 1.8), (pirate, 1.8), (as_json, 1.6)])
def test_the_voices_do_not_fall_apart_into_letters(voice, bound: float) -> None:
    text = "Once there was a small fox who lived in the forest. A hammer is used to hit nails into wood."
    plain = len(TOKENIZER.encode(text, add_special_tokens=False))
    assert plain < len(text) / 3
    assert len(TOKENIZER.encode(voice(text), add_special_tokens=False)) < bound * plain
