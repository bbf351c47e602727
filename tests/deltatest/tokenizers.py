"""Small real tokenizers of the two families in use, built in memory."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from deltaserve.text import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "user assistant system hello world, how are you today? 123 4567",
    "def main():\n    return {'key': [1, 2, 3]}",
    "naïve café 你好世界 🙂🙃 שלום привет",
]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|start|>", "<|end|>")


@functools.cache
def byte_level(chat_template: str | None = TEMPLATE) -> Tokenizer:
    """GPT-2 style byte-level BPE of about 400 entries; ``<|end|>`` ends a sequence."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", special=False)])
    return Tokenizer(_wrap(backend, chat_template))


@functools.cache
def sentencepiece_like() -> Tokenizer:
    """Llama-2 style BPE: spaces as U+2581, byte fallback, a leading space stripped when decoding."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁]+|▁"), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS[:3], trainer)
    return Tokenizer(_wrap(_byte_tokens_as_pieces(backend), TEMPLATE))


def _byte_tokens_as_pieces(backend: Backend) -> Backend:
    """The byte tokens belong to the vocabulary, not to the added tokens as the trainer leaves them."""
    import json

    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Backend.from_str(json.dumps(state))


def _wrap(backend: Backend, chat_template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
