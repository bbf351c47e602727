"""From a finished run to a served adapter: gate, parity with the engine, then the same door as an upload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from deltaserve_trainer.base import load_model
from deltaserve_trainer.errors import GateRefused, ParityFailed
from deltaserve_trainer.methods import load_method
from deltaserve_trainer.run_folder import RunFolder
from deltaserve_trainer.train import TrainingResult, write_card

Admitted = TypeVar("Admitted")
Answer = Callable[[list[list[int]]], Sequence[Tensor]]
"""Logits of every position of each prompt, float ``[num_tokens, vocab]``, by the engine with the adapter applied."""

FLOAT32_TOLERANCE = 1e-4
LOW_PRECISION_FACTOR = 4.0


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest absolute difference of logits between trainer (float32) and engine, and what was allowed."""

    num_prompts: int
    num_tokens: int
    max_difference: float
    tolerance: float
    engine_dtype: str

    @property
    def has_passed(self) -> bool:
        return self.max_difference <= self.tolerance


@dataclass(frozen=True, slots=True)
class Registration(Generic[Admitted]):
    """What the door returned, and the parity report that is now part of the card."""

    admitted: Admitted
    parity: Parity


def check_gate(result: TrainingResult, *, min_gain: float = 0.0) -> None:
    """Raise ``GateRefused`` unless the adapter is finite and beats the base on held-out data by over ``min_gain``."""
    evaluation = result.evaluation
    if not result.is_finite:
        raise GateRefused("the adapter holds values that are not finite; lower learning_rate and train again")
    if not evaluation.gain > min_gain:
        raise GateRefused(
            f"held-out loss is {evaluation.adapter_target:.4f} with the adapter, {evaluation.base_target:.4f} without; "
            f"it must be lower by more than {min_gain:g}. Nothing was registered; train longer or on more data"
        )


def check_parity(result: TrainingResult, answer: Answer, *, engine_dtype: torch.dtype = torch.float32) -> Parity:
    """Compare the saved adapter in the trainer with the engine. Raises ``ParityFailed``.

    Allowed in float32: 1e-4 of the largest logit (1e-4 at least). In lower precision: four times the distance that
    rounding the base alone causes on the same tokens.
    """
    prompts = [list(prompt) for prompt in result.parity_prompts]
    base = result.base
    method = load_method(load_model(base.folder), result.adapter_folder, base)
    expected = _logits(method.model, prompts)
    tolerance = FLOAT32_TOLERANCE * max(1.0, *(float(logits.abs().max()) for logits in expected))
    if engine_dtype is not torch.float32:
        with method.disabled():
            exact = _logits(method.model, prompts)
        rounded = _logits(load_model(base.folder).to(engine_dtype), prompts)
        tolerance = LOW_PRECISION_FACTOR * _max_difference(exact, rounded)
    found = [torch.as_tensor(logits).float().cpu() for logits in answer(prompts)]
    if [tuple(f.shape) for f in found] != [tuple(e.shape) for e in expected]:
        raise ParityFailed(
            f"the engine answered logits of shapes {[tuple(f.shape) for f in found]}; "
            f"expected {[tuple(e.shape) for e in expected]}. Nothing was registered"
        )
    parity = Parity(
        num_prompts=len(prompts),
        num_tokens=sum(map(len, prompts)),
        max_difference=_max_difference(expected, found),
        tolerance=tolerance,
        engine_dtype=str(engine_dtype).removeprefix("torch."),
    )
    if not parity.has_passed:  # also when the difference is NaN
        raise ParityFailed(
            f"the engine's logits differ from the trainer's by {parity.max_difference:.3g}; "
            f"allowed: {parity.tolerance:.3g} ({parity.engine_dtype}). Nothing was registered"
        )
    return parity


def register(
    result: TrainingResult,
    *,
    answer: Answer,
    admit: Callable[[Path], Admitted],
    engine_dtype: torch.dtype = torch.float32,
    min_gain: float = 0.0,
) -> Registration[Admitted]:
    """Gate, parity, card, then ``admit(adapter folder)``; whatever fails raises before anything is registered."""
    check_gate(result, min_gain=min_gain)
    parity = check_parity(result, answer, engine_dtype=engine_dtype)
    folder = RunFolder(result.run_folder)
    folder.write("parity.json", {**asdict(parity), "has_passed": parity.has_passed})
    write_card(result, asdict(parity))
    folder.write_manifest()
    return Registration(admit(result.adapter_folder), parity)


@torch.no_grad()
def _logits(model: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    model.eval()
    return [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in prompts]


def _max_difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest absolute difference; NaN when any is NaN."""
    return float(torch.cat([(a - b).abs().flatten() for a, b in zip(left, right, strict=True)]).max())
