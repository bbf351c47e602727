"""An adapter on another base: what carries over, and whether the two bases are near enough for it to mean the same.

The delta is added to the new base's weights (diff transfer; scales multiply the new base's). That rests on both bases
lying in one basin: then their weights point the same way, and the loss along the line between them has no hump.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deltaserve_store.spec import BaseSpec
from deltaserve_trainer.base import linears_of
from deltaserve_trainer.encoding import EncodedExample
from deltaserve_trainer.errors import RebaseRefused
from deltaserve_trainer.loss import mean_loss
from deltaserve_trainer.merging.update import Update

LEAST_SIMILARITY = 0.8
MOST_BARRIER = 0.1
"""Nats per token above the straight line between the two bases' own losses."""
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
MAX_LISTED = 5


@dataclass(frozen=True, slots=True)
class Relation:
    """``similarity``: cosine of all linears' weights together. ``line``: mean loss at ``STEPS`` from the old base to
    the new one, nats per token."""

    similarity: float
    line: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """How far the line's loss rises above what its ends would let expect; 0 without a hump."""
        first, last = self.line[0], self.line[-1]
        return max(0.0, *(loss - (1 - t) * first - t * last for t, loss in zip(STEPS, self.line, strict=True)))

    @property
    def is_near(self) -> bool:
        return self.similarity >= LEAST_SIMILARITY and self.barrier <= MOST_BARRIER


def check_fit(update: Update, spec: BaseSpec) -> None:
    """Raises ``RebaseRefused`` naming what the new base has no place for."""
    problems = []
    for name, change in update.linears.items():
        linear = spec.linears.get(name)
        found = None if linear is None else (linear.out_features, linear.in_features)
        if found != change.shape:
            problems.append(f"{name} is {list(found) if found else 'not there'}, the adapter's is {list(change.shape)}")
    for name, parts in update.norms.items():
        norm = spec.norms.get(name)
        sizes = {len(vector) for vector in parts.values()}
        if norm is None or sizes != {norm.size} or ("shift" in parts and not norm.has_bias):
            problems.append(f"the norm {name} is not there, or of another size")
    if problems:
        more = f" (and {len(problems) - MAX_LISTED} more)" if len(problems) > MAX_LISTED else ""
        raise RebaseRefused(f"the new base has another shape: {'; '.join(problems[:MAX_LISTED])}{more}")


@torch.no_grad()
def relation(old: nn.Module, new: nn.Module, rows: Sequence[EncodedExample], *, pad_token_id: int) -> Relation:
    """Measure two models of one shape; ``old`` is moved to where ``new`` is. Raises ``RebaseRefused``."""
    moved, goal = dict(old.named_parameters()), dict(new.named_parameters())
    if {name: p.shape for name, p in moved.items()} != {name: p.shape for name, p in goal.items()}:
        raise RebaseRefused("the two bases have different parameters; a delta of one has no place in the other")
    similarity = _cosine(old, new)
    losses = []
    at = 0.0
    for step in STEPS:
        for name, parameter in moved.items():
            if step == 1.0:
                parameter.data.copy_(goal[name])
            elif step > at:  # from where it is, so that no third copy is held
                parameter.data.lerp_(goal[name], (step - at) / (1 - at))
        at = step
        losses.append(mean_loss(old, rows, batch_size=8, pad_token_id=pad_token_id, precision="float32"))
    return Relation(similarity, tuple(losses))


def _cosine(old: nn.Module, new: nn.Module) -> float:
    product = first = second = 0.0
    others = linears_of(new)
    for name, linear in linears_of(old).items():
        one, other = linear.get_parameter("weight").double(), others[name].get_parameter("weight").double()
        product += float((one * other).sum())
        first += float(one.square().sum())
        second += float(other.square().sum())
    return product / (first * second) ** 0.5 if first and second else 0.0
