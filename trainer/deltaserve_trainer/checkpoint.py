"""The state of a run between two training steps: safetensors and JSON, complete or absent, never a pickle.

A checkpoint is a folder ``step-00000120`` with ``state.safetensors`` (parameters, both moments of AdamW, the mask of a
sparse method, the best parameters so far) and ``state.json``, which carries the SHA-256 of the tensors and is written
last. There is no random state to keep: batches and dropout of step s are functions of (seed, s).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltaserve_trainer.errors import ResumeRefused

_KEPT = 2


@dataclass(frozen=True, slots=True)
class Counters:
    """Where the loop stands after ``step`` steps. ``num_tokens`` counts trained-on tokens without padding."""

    step: int = 0
    num_tokens: int = 0
    train_seconds: float = 0.0
    best_step: int = 0
    best_loss: float | None = None
    num_worse: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """``tensors`` is keyed ``param.NAME``, ``first.NAME``, ``second.NAME``, ``best.NAME``, ``structure.NAME``."""

    counters: Counters
    tensors: dict[str, Tensor]

    def part(self, kind: str) -> dict[str, Tensor]:
        prefix = kind + "."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def pack(
    counters: Counters,
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    best: dict[str, Tensor],
    structure: dict[str, Tensor],
) -> Checkpoint:
    """A checkpoint of the live objects; tensors are references, save before the next step."""
    tensors = {f"structure.{name}": tensor for name, tensor in structure.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in parameters.items():
        tensors[f"param.{name}"] = parameter.detach()
        if state := optimiser.state.get(parameter):
            tensors[f"first.{name}"] = state["exp_avg"]
            tensors[f"second.{name}"] = state["exp_avg_sq"]
    return Checkpoint(counters, tensors)


def unpack(checkpoint: Checkpoint, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    """Put parameters and AdamW state back. Raises ``ResumeRefused`` where names or shapes differ."""
    saved, first, second = checkpoint.part("param"), checkpoint.part("first"), checkpoint.part("second")
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in saved.items()}:
        raise ResumeRefused("the checkpoint holds other parameters than this recipe trains; start a new run directory")
    for name, parameter in parameters.items():
        parameter.data.copy_(saved[name])
        if name in first:
            optimiser.state[parameter] = {
                "step": torch.tensor(float(checkpoint.counters.step)),
                "exp_avg": first[name].to(parameter.device).clone(),
                "exp_avg_sq": second[name].to(parameter.device).clone(),
            }


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write below ``folder``; the previous one stays until this one is complete, older ones go."""
    path = folder / f"step-{checkpoint.counters.step:08d}"
    partial = folder / (path.name + ".partial")
    for stale in (partial, path):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({n: t.contiguous().cpu() for n, t in checkpoint.tensors.items()}, partial / "state.safetensors")
    digest = hashlib.sha256((partial / "state.safetensors").read_bytes()).hexdigest()
    content = {**asdict(checkpoint.counters), "sha256": digest}
    (partial / "state.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    os.replace(partial, path)
    for old in sorted(folder.glob("step-????????"))[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint below ``folder``; damaged ones are passed over; None when there is none."""
    for path in sorted(folder.glob("step-????????"), reverse=True):
        try:
            content = json.loads((path / "state.json").read_text("utf-8"))
            digest = hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest()
            if content.pop("sha256") == digest:
                return Checkpoint(Counters(**content), load_file(path / "state.safetensors"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
