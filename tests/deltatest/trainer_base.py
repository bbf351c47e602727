"""A tiny random base with a real byte-level tokenizer and a chat template, as a checkpoint folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = "the cat sat on a mat and saw seven small birds near our old house by the river while rain fell".split()  # noqa: SIM905


def make_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=SPECIAL[2:]
    )
    fast.chat_template = template
    return fast


def make_base(folder: Path, *, architecture: str = "llama", seed: int = 0) -> Path:
    """Two layers, 32 wide; ``architecture`` "gpt2" has Conv1D weights (stored transposed) with biases."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    if architecture == "llama":
        model: torch.nn.Module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=256,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=tokenizer.eos_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path: Path, num_rows: int, *, seed: int = 0) -> Path:
    """Prompt/completion rows that a small adapter can learn: the completion repeats one fixed phrase."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            prompt = " ".join(generator.choices(WORDS, k=generator.randint(2, 7)))
            file.write(json.dumps({"prompt": prompt, "completion": " the old river"}) + "\n")
    return path


def write_texts(path: Path, num_rows: int, *, seed: int = 1) -> Path:
    generator = random.Random(seed)
    rows = [{"text": " ".join(generator.choices(WORDS, k=12))} for _ in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
