"""Which k weights a sparse adapter changes: exactly k over all targeted linears, wherever they matter most."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deltaserve_trainer.errors import TrainingDiverged
from deltaserve_trainer.methods import LossOfBatch


def select_by_gradient(
    targets: Mapping[str, nn.Parameter | Tensor],
    k: int,
    loss_of_batch: LossOfBatch,
    num_batches: int,
    on_step: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """The k largest sums of squared gradients over ``num_batches`` batches (empirical Fisher, Sung et al. 2021).

    Returns sorted flat positions, int64, by linear. Each weight's gradient is added up and freed as soon as it is
    there, so one dense gradient exists at a time next to the sums.
    """
    sums = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in targets.items()}
    handles = []
    try:
        for name, weight in targets.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(_add_square(sums[name])))
        for i in range(num_batches):
            loss_of_batch(i).backward()
            on_step(i + 1, num_batches)
    finally:
        for handle in handles:
            handle.remove()
        for weight in targets.values():
            weight.requires_grad_(False)
            weight.grad = None
    return largest_entries(sums, k)


def select_by_magnitude(
    targets: Mapping[str, Tensor],
    k: int,
    loss_of_batch: LossOfBatch,
    num_steps: int,
    learning_rate: float,
    max_grad_norm: float,
    on_step: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """The k weights that move farthest in ``num_steps`` of dense training (LT-SFT, Ansell et al. 2022).

    The dense training is undone exactly: the weights are put back from a copy.
    """
    before = {name: weight.detach().clone() for name, weight in targets.items()}
    weights = list(targets.values())
    try:
        for weight in weights:
            weight.requires_grad_(True)
        optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
        for i in range(num_steps):
            loss_of_batch(i).backward()
            torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
            optimiser.step()
            optimiser.zero_grad()
            on_step(i + 1, num_steps)
        moved = {name: (weight.detach() - before[name]).abs() for name, weight in targets.items()}
    finally:
        for name, weight in targets.items():
            weight.requires_grad_(False)
            weight.grad = None
            weight.data.copy_(before[name])
    return largest_entries(moved, k)


def largest_entries(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Sorted flat positions of the k largest scores over all tensors together; linears without one are left out."""
    values, origins = [], []
    for name, score in scores.items():
        if not score.isfinite().all():
            raise TrainingDiverged(f"choosing the weights to train met a value that is not a number in {name}")
        best = torch.topk(score.flatten(), min(k, score.numel()))
        values.append(best.values)
        origins.append((name, best.indices))
    chosen = torch.zeros(sum(len(v) for v in values), dtype=torch.bool, device=values[0].device)
    chosen[torch.topk(torch.cat(values), k).indices] = True
    picked: dict[str, Tensor] = {}
    start = 0
    for name, index in origins:
        mine = index[chosen[start : start + len(index)]]
        start += len(index)
        if len(mine):
            picked[name] = mine.sort().values
    return picked


def _add_square(total: Tensor) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        if weight.grad is not None:
            total.addcmul_(weight.grad, weight.grad)
            weight.grad = None

    return add
