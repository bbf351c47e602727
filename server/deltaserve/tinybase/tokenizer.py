"""The tokenizer of the embedded base: byte-level BPE, 2048 entries, and the chat template that goes with it.

Words are split as in GPT-2, but every digit stands alone, so that sums are seen digit by digit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from deltaserve.tinybase.corpus import documents
from deltaserve.tinybase.voices import as_json, pirate, shout

VOCAB_SIZE = 2048
PAD, BOS, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('the role must be system, user or assistant, found: ' ~ message['role']) -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def training_texts(count: int, seed: int = 11) -> Iterator[str]:
    """Corpus texts, and a share of them in the demo adapters' voices: those must not fall apart into letters."""
    for number, document in enumerate(islice(documents(seed, "train"), count)):
        parts = [document.text] if document.text is not None else [m["content"] for m in document.messages or []]
        for part in parts:
            if part is None:
                continue
            yield part
            if number % 6 == 0:
                yield shout(part)
            elif number % 6 == 1:
                yield pirate(part)
            elif number % 6 == 2:
                yield as_json(part)
        if number % 20 == 0:
            yield "0 1 2 3 4 5 6 7 8 9 0"


def train_tokenizer(out: Path, *, texts: int = 12_000, vocab_size: int = VOCAB_SIZE) -> None:
    """Train on `texts` documents and write tokenizer.json, tokenizer_config.json and chat_template.jinja to `out`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(out)
    # The generic class name is understood by every version of transformers; the default one only by the newest.
    settings = out / "tokenizer_config.json"
    fields = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
