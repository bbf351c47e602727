"""The "small" fixture: a base of 115.6 M parameters with random weights, and LoRA adapters that go with it.

    python -m loadtest.small FOLDER --adapters 32 --rank 8

Figures taken on it say how fast a server is and nothing about quality. Everything comes from the seed: two machines
write the same bytes. The files are what every server reads: a Llama checkpoint in bfloat16, a byte-level BPE tokenizer,
PEFT folders with all seven projections and a B that is not zero.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BASE_NAME = "small"
RECORD = "fixture.json"
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALPHA_PER_RANK = 2.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama with tied embeddings. The defaults are the published ones; tests use smaller."""

    hidden: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocab: int = 16384
    max_len: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def projections(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of the seven linears of a layer, by their path in it."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


@dataclass(frozen=True, slots=True)
class Fixture:
    """What a folder holds. ``adapters`` maps names to ``(rank, folder)``; prompts are drawn from ``plain_tokens``."""

    folder: Path
    base: Path
    adapters: dict[str, tuple[int, Path]]
    plain_tokens: tuple[int, int]
    seed: int
    shape: Shape

    def of_rank(self, rank: int | None = None) -> list[str]:
        return [name for name, (own, _) in self.adapters.items() if rank is None or own == rank]

    @classmethod
    def read(cls, folder: Path) -> Fixture:
        """Raises ``ValueError`` where the folder was not written by this module."""
        try:
            found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            adapters = {
                item["name"]: (int(item["rank"]), folder / "adapters" / item["name"]) for item in found["adapters"]
            }
            low, high = found["plain_tokens"]
            return cls(folder, folder / BASE_NAME, adapters, (low, high), found["seed"], Shape(**found["shape"]))
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise ValueError(
                f"{folder} holds no fixture; write one with python -m loadtest.small {folder}"
            ) from problem


def write(folder: Path, *, adapters: int, ranks: Sequence[int], seed: int = 0, shape: Shape | None = None) -> Fixture:
    """Writes base and ``adapters`` adapters of each rank. What an earlier call with this seed and shape wrote stays."""
    shape = shape or Shape()
    known: dict[str, tuple[int, Path]] = {}
    try:
        before = Fixture.read(folder)
    except ValueError:
        before = None
    if before is not None:
        if (before.seed, before.shape) != (seed, shape):
            raise ValueError(f"{folder} holds a fixture of another seed or shape; choose an empty folder")
        known = before.adapters
    else:
        write_base(folder / BASE_NAME, shape, seed)
    for rank in ranks:
        for number in range(adapters):
            name = f"r{rank}-{number:03d}"
            if name not in known:
                write_adapter(folder / "adapters" / name, shape, rank, seed=_seed_of(seed, rank, number))
                known[name] = (rank, folder / "adapters" / name)
    low = len(SPECIAL_TOKENS) + 256
    record = {
        "base": BASE_NAME,
        "seed": seed,
        "shape": {name: getattr(shape, name) for name in Shape.__slots__},
        "plain_tokens": [low, shape.vocab],
        "adapters": [{"name": name, "rank": rank} for name, (rank, _) in known.items()],
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Fixture.read(folder)


def _seed_of(seed: int, rank: int, number: int) -> int:
    return 1_000_003 * (seed + 1) + 10_007 * rank + number


def write_base(folder: Path, shape: Shape, seed: int) -> None:
    """Checkpoint and tokenizer. Branches that write into the residual stream are scaled down by its depth.

    Rows of tokens that are not whole characters are zero, so that greedy answers are text all through and a client
    can count every token as it comes.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def normal(std: float, *size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * std).to(torch.bfloat16)

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    embedding = normal(0.05, shape.vocab, shape.hidden)
    embedding[: len(SPECIAL_TOKENS) + 256] = 0
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones.clone()}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = ones.clone()
        tensors[prefix + "post_attention_layernorm.weight"] = ones.clone()
        for path, size in shape.projections().items():
            deep = (2 * shape.layers) ** -0.5 if path.endswith(("o_proj", "down_proj")) else 1.0
            tensors[f"{prefix}{path}.weight"] = normal(size[1] ** -0.5 * deep, *size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    write_tokenizer(folder, shape.vocab)


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Byte-level BPE whose words are made up: pairs of letters, then pairs of pairs, with and without a space before.

    Ids: the special tokens, 256 bytes, then ``vocab - 259`` words, each of them whole ASCII text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for left, right in _words(vocab - len(pieces)):
        pieces.append(left + right)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, bos, eos = SPECIAL_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": 1 << 20,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _words(count: int) -> Iterator[tuple[str, str]]:
    """``count`` distinct merges of pieces that exist before them; raises ``ValueError`` where there are not so many."""
    space = "\u0120"  # how byte-level BPE writes a space
    pairs = [(a, b) for a in LETTERS for b in LETTERS]
    made = [*pairs, *((space, a + b) for a, b in pairs)]
    quads = range(2 * len(pairs) ** 2)
    for index in random.Random(0).sample(quads, max(0, min(count - len(made), len(quads)))):
        left, right = divmod(index // 2, len(pairs))
        made.append((space * (index % 2) + "".join(pairs[left]), "".join(pairs[right])))
    if not 0 <= count <= len(made):
        raise ValueError(f"a vocabulary of {count} words cannot be made; between 0 and {len(made)} can")
    yield from made[:count]


def adapter_tensors(shape: Shape, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A PEFT LoRA's tensors, bfloat16: A ``[rank, in]`` of unit gain, B ``[out, rank]`` small and nowhere zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape.layers):
        for path, (out, width) in shape.projections().items():
            prefix = f"base_model.model.model.layers.{layer}.{path}."
            a = torch.randn(rank, width, generator=generator) * width**-0.5
            b = torch.randn(out, rank, generator=generator) * (0.2 / ALPHA_PER_RANK) * rank**-0.5
            tensors[prefix + "lora_A.weight"] = a.to(torch.bfloat16)
            tensors[prefix + "lora_B.weight"] = b.to(torch.bfloat16)
    return tensors


def adapter_config(shape: Shape, rank: int) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
        "r": rank,
        "lora_alpha": ALPHA_PER_RANK * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(path.rpartition(".")[2] for path in shape.projections()),
    }


def write_adapter(folder: Path, shape: Shape, rank: int, *, seed: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(shape, rank, seed), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "adapter_config.json", adapter_config(shape, rank))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.small", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapters", type=int, default=32, help="adapters of each rank")
    parser.add_argument("--rank", type=int, action="append", help="repeatable; default 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=Shape().layers, help="fewer make a smaller fixture")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    given = parser.parse_args(argv)
    try:
        shape = replace(Shape(), layers=given.layers)
        made = write(given.folder, adapters=given.adapters, ranks=given.rank or [8], seed=given.seed, shape=shape)
    except ValueError as problem:
        parser.error(str(problem))
    print(f"{made.base}: the base; {len(made.adapters)} adapters in {given.folder / 'adapters'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
