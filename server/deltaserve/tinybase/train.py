"""Pre-training of the embedded base: model sizes, the optimisation loop, and the held-out loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.nn import functional

from deltaserve.tinybase.batches import IGNORED, SHORT_ROW

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Size:
    """Llama sizes; the defaults are the shipped checkpoint."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 704
    context: int = 1024


@dataclass(frozen=True)
class Plan:
    """How long and how to train. Exactly one of `steps` and `minutes` bounds the run."""

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    bf16: bool = True
    compile: bool = True

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")


@dataclass(frozen=True)
class Outcome:
    steps: int
    tokens: int  # targets seen
    seconds: float
    losses: tuple[float, ...]  # training loss of each step, nats per token


def new_model(size: Size, vocab_size: int, *, bos: int, end: int, pad: int, seed: int) -> Any:
    """A fresh LlamaForCausalLM in float32 with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=bos,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


def _loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean loss over targets. inputs, targets: int64 [rows, length]; result: float32 scalar, nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _optimizers(model: Any, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms.

    With the same steps Muon reaches the loss that AdamW alone reaches with about half as many again; its
    orthogonalisation costs about a tenth of a step at this size.
    """
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.dim() == 2 and "embed" not in name]
    rest = [weight for name, weight in named if weight.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices,
            lr=plan.learning_rate,
            weight_decay=plan.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(model: Any, data: Iterator[Batch], plan: Plan, report: Callable[[int, float, float, float], None]) -> Outcome:
    """Train in place. `report(step, share done, loss, tokens per second)` is called every 25 steps.

    The rate rises over `warmup_steps` and falls along a cosine to a twentieth, over steps or over time.
    """
    optimizers = _optimizers(model, plan)
    # Only the usual shape is compiled; the compiled module shares the parameters of `model`.
    compiled = torch.compile(model, dynamic=False) if plan.compile else model
    model.train()
    losses: list[float] = []
    tokens = 0
    start = time.monotonic()
    while True:
        step = len(losses)
        spent = time.monotonic() - start
        done = step / plan.steps if plan.steps is not None else spent / (60.0 * (plan.minutes or 1.0))
        if done >= 1.0:
            break
        rate = plan.learning_rate * (0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * done)))
        rate *= min(1.0, (step + 1) / plan.warmup_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        inputs, targets = next(data)
        forward = compiled if inputs.shape[1] == SHORT_ROW else model
        loss = _loss(forward, inputs, targets, plan.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"the loss is {losses[-1]} at step {step}; try a lower learning rate")
        tokens += int((targets != IGNORED).sum())
        if step % 25 == 0:
            report(step, done, sum(losses[-25:]) / len(losses[-25:]), tokens / max(1e-9, time.monotonic() - start))
    model.eval()
    return Outcome(len(losses), tokens, time.monotonic() - start, tuple(losses))


@torch.inference_mode()
def evaluate(model: Any, data: Iterator[Batch], count: int) -> float:
    """Mean loss over the targets of `count` batches, in float32, nats per token."""
    model.eval()
    total, tokens = 0.0, 0
    for inputs, targets in islice(data, count):
        seen = int((targets != IGNORED).sum())
        total += float(_loss(model, inputs, targets, bf16=False)) * seen
        tokens += seen
    return total / max(1, tokens)
