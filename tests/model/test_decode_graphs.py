"""Decode graphs without a GPU: a capture that runs the very same pass again stands in for a CUDA graph.

What a graph freezes on the host, the pass must not read: ``graph_cases`` beside the kernels' tests holds that with a
tape of the recorded operations. Here: how steps are laid out, which graph a step takes, and every number equal to the
eager runner's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deltaserve.model.base import BaseModel, load_base
from deltaserve_kernels import use_backend
from deltatest.graph_rig import GraphRig
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _reference_operators() -> Iterator[None]:
    """The C++ operators want lists without empty items."""
    before = use_backend("reference")
    yield
    use_backend(before)


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi3-longrope"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = build_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


def test_random_steps_equal_the_eager_runner_to_the_bit(base: BaseModel) -> None:
    rig = GraphRig(base)
    for step in range(30):
        rig.change_adapters()
        rig.check(rig.random_batch(), f"step {step}")
    assert rig.num_captures == rig.graphs.num_graphs == len(rig.graphs.row_counts) * 4
