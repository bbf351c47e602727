"""Adapters of the PEFT types that turn inputs or outputs, written by PEFT with every trained tensor random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from deltaserve_store.formats.deltaserve_rotations import write_rotation_adapter
from deltaserve_store.rotation_deltas import RotationBlocks, RotationDelta
from deltaserve_store.spec import BaseSpec
from deltatest.peft_kinds import KindCase, write_case

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def _around_one(wrapped: Any) -> None:
    """Scales that were drawn around 0."""
    for name, parameter in wrapped.named_parameters():
        if "road_alpha" in name or "boft_s" in name:
            parameter.data += 1


_BOFT = {"boft_block_size": 4, "boft_n_butterfly_factor": 3}
CASES: dict[str, KindCase] = {
    "oft": KindCase("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}, 0.1),
    "oft-series": KindCase("OFTConfig", {"oft_block_size": 8}, 0.05),
    # Blocks of 12 become 8 or 16 where 12 divides nothing; PEFT's config goes on saying 12.
    "oft-moved": KindCase("OFTConfig", {"oft_block_size": 12, "num_cayley_neumann_terms": 4}, 0.05),
    "oft-number": KindCase("OFTConfig", {"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 7}, 0.05),
    "oft-shared": KindCase("OFTConfig", {"oft_block_size": 4, "block_share": True, "use_cayley_neumann": False}, 0.2),
    "oft-bound": KindCase("OFTConfig", {"oft_block_size": 8, "coft": True, "eps": 0.8}, 0.1),
    "road-1": KindCase("RoadConfig", {"variant": "road_1", "group_size": 8}, 0.2, _around_one),
    "road-2": KindCase("RoadConfig", {"variant": "road_2", "group_size": 16}, 0.2, _around_one),
    "road-4": KindCase("RoadConfig", {"variant": "road_4", "group_size": 2}, 0.2, _around_one),
    "boft": KindCase("BOFTConfig", _BOFT, 0.1, _around_one),
    "boft-one": KindCase("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 4}, 0.1, _around_one),
    "boft-no-compiler": KindCase("BOFTConfig", {**_BOFT, "boft_n_butterfly_factor": 2}, 0.1, _around_one),
    "beft": KindCase("BeftConfig", {}, 0.2),
}


@contextmanager
def butterflies(*, has_compiler: bool = True) -> Iterator[None]:
    """PEFT builds CUDA code to multiply BOFT out; here PyTorch does it, or PEFT hears that it cannot be built."""

    def forward(factors: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*blocks) for blocks in factors])]

    found = SimpleNamespace(forward=forward) if has_compiler else None
    with mock.patch("peft.tuners.boft.layer.get_fbd_cuda", return_value=found):
        yield


def make_rotation(model: torch.nn.Module, folder: Path, name: str, *, seed: int = 0, **options: Any) -> Path:
    """Write the adapter of case ``name``."""
    with butterflies(has_compiler=name != "boft-no-compiler"):
        return write_case(model, folder, CASES[name], seed=seed, **{"targets": TARGETS, **options})


def compiler_of(name: str) -> Any:
    """Under this, PEFT reads the file of case ``name`` back."""
    return butterflies(has_compiler=name != "boft-no-compiler")


def make_givens(spec: BaseSpec, folder: Path, *, seed: int = 0, std: float = 0.1) -> Path:
    """Rounds of Givens rotations in the project's own format, as qGOFT has them: pairs of neighbours, then of places 2
    apart, 4 apart, ..., not quite orthogonal; inputs of ``q_proj`` and ``down_proj``, outputs of ``v_proj``."""
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for name, linear in spec.linears.items():
        if not name.endswith(("q_proj", "v_proj", "down_proj")):
            continue
        side = "output" if name.endswith("v_proj") else "input"
        width = linear.out_features if side == "output" else linear.in_features
        factors = []
        for level in range(3):
            angles = torch.randn(width // 2, generator=generator) * std
            slack = 1 + torch.randn(width // 2, generator=generator) * std / 4
            cos, sin = angles.cos() * slack, angles.sin() * slack
            blocks = torch.stack([torch.stack([cos - 1, sin], 1), torch.stack([-sin, cos - 1], 1)], 1)
            order = torch.arange(width).view(-1, 2, 1 << level).transpose(1, 2).reshape(-1)
            factors.append(RotationBlocks(blocks, None if level == 0 else order))
        deltas.append(RotationDelta(name, side, tuple(factors), lambda weight: weight))
    write_rotation_adapter(folder, deltas, spec.fingerprint, method="qgoft")
    return folder


def whole_matrix(delta: RotationDelta, width: int) -> torch.Tensor:
    """The matrix of a rotation for row vectors, float64 [width, width], entry by entry."""
    whole = torch.eye(width, dtype=torch.float64)
    for changes, order in delta.factors:
        places = list(range(width)) if order is None else order.tolist()
        factor = torch.eye(width, dtype=torch.float64)
        size = changes.shape[-1]
        for at in range(width):
            for to in range(at // size * size, at // size * size + size):
                block = changes[at // size] if len(changes) > 1 else changes[0]
                factor[places[at], places[to]] += block[at % size, to % size].double()
        whole = whole @ factor
    return whole
