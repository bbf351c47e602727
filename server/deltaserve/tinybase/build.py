"""Build the embedded base from nothing: corpus, tokenizer, training, evaluation, model card.

Run as `python -m deltaserve.tinybase.build [--out DIR] [--minutes N | --steps N] [--seed N]`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from deltaserve.tinybase.batches import batches
from deltaserve.tinybase.card import Measured, write_card
from deltaserve.tinybase.corpus import Document, documents
from deltaserve.tinybase.tokenizer import train_tokenizer
from deltaserve.tinybase.train import Outcome, Plan, Size, evaluate, new_model, train

TRAIN_SEED, HELDOUT_SEED = 1, 2
HELDOUT_BATCHES = 24


def encoder(tokenizer: Any) -> Any:
    """Document -> token ids: `<bos> text <end>`, or the rendered conversation."""

    def encode(document: Document) -> list[int]:
        if document.text is not None:
            return [*tokenizer.encode(document.text), tokenizer.eos_token_id]
        text = tokenizer.apply_chat_template(document.messages, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))

    return encode


def _bytes_per_token(tokenizer: Any, count: int = 400) -> float:
    """UTF-8 bytes of text per token of text, special tokens counted as tokens without bytes."""
    encode = encoder(tokenizer)
    size = tokens = 0
    for document in islice(documents(HELDOUT_SEED, "heldout"), count):
        parts = [document.text] if document.text is not None else [m["content"] for m in document.messages or []]
        size += sum(len((part or "").encode()) for part in parts)
        tokens += len(encode(document)) - 1  # the first token is never a target
    return size / tokens


def build(
    out: Path,
    plan: Plan,
    *,
    size: Size | None = None,
    seed: int = 0,
    batch_tokens: int = 2048,
    tokenizer_texts: int = 12_000,
    vocab_size: int = 2048,
    heldout_batches: int = HELDOUT_BATCHES,
    sample_tokens: int = 200,
    tokenizer_from: Path | None = None,
) -> tuple[Outcome, Measured]:
    """Write a checkpoint folder to `out`, which must be absent or empty; it appears whole or not at all."""
    from transformers import AutoTokenizer

    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another folder or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=out.parent) as scratch:
        work = Path(scratch) / "checkpoint"
        work.mkdir()
        print("tokenizer", flush=True)
        if tokenizer_from is None:
            train_tokenizer(work, texts=tokenizer_texts, vocab_size=vocab_size)
        else:
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copyfile(tokenizer_from / name, work / name)
        tokenizer = AutoTokenizer.from_pretrained(work)
        pad, bos, end = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        model = new_model(size or Size(), len(tokenizer), bos=bos, end=end, pad=pad, seed=seed)
        parameters = sum(weight.numel() for weight in model.parameters())
        print(f"training {parameters:,} parameters", flush=True)
        encode = encoder(tokenizer)

        def report(step: int, done: float, loss: float, rate: float) -> None:
            print(f"step {step:5d}  {done:4.0%}  loss {loss:.3f}  {rate:,.0f} tokens/s", flush=True)

        data = batches(encode, TRAIN_SEED + 1000 * seed, "train", tokens=batch_tokens, pad=pad, bos=bos)
        outcome = train(model, data, plan, report)
        model = model.to(torch.bfloat16)
        model.generation_config.update(bos_token_id=bos, eos_token_id=end, pad_token_id=pad, do_sample=False)
        model.save_pretrained(work)
        model = type(model).from_pretrained(work, dtype=torch.float32)
        held = batches(
            encode, HELDOUT_SEED, "heldout", tokens=batch_tokens, pad=pad, bos=bos, chunk=25 * heldout_batches
        )
        loss = evaluate(model, held, heldout_batches)
        measured = Measured(
            parameters, outcome.steps, outcome.tokens, outcome.seconds / 60, seed, loss, _bytes_per_token(tokenizer)
        )
        print(f"held-out loss {loss:.4f} nats per token, {measured.bits_per_byte:.4f} bits per byte", flush=True)
        write_card(work, model, tokenizer, measured, sample_tokens)
        if out.exists():
            out.rmdir()
        for file in work.iterdir():
            file.chmod(0o644)  # safetensors files are written for their owner alone
        work.rename(out)
    print(f"wrote {out}", flush=True)
    return outcome, measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; the folder it writes can be served with `deltaserve serve --model DIR`."""
    parser = argparse.ArgumentParser(prog="python -m deltaserve.tinybase.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/tinybase"), help="folder to write, absent or empty")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument("--minutes", type=float, default=None, help="training time (default 25)")
    bound.add_argument("--steps", type=int, default=None, help="training steps instead of minutes; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--tokenizer", type=Path, default=None, help="take the tokenizer of this checkpoint folder")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    minutes = None if options.steps is not None else (options.minutes or 25.0)
    plan = Plan(steps=options.steps, minutes=minutes, compile=not options.no_compile)
    build(options.out, plan, seed=options.seed, tokenizer_from=options.tokenizer)


if __name__ == "__main__":
    main()
