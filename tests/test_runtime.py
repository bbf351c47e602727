"""How a runtime is put together: the base's names, the operators, the decode graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve import runtime
from deltaserve.config import ServeConfig
from deltaserve.engine.decode_graphs import DecodeGraphs
from deltaserve.errors import ConfigError
from deltaserve.runtime import base_names, can_capture, choose_operators
from deltaserve_kernels import backend, use_backend
from deltatest.runtime_factory import SMALL, open_runtime
from deltatest.tiny_models import build_tiny_model


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_the_embedded_base_has_its_own_name() -> None:
    assert base_names(ServeConfig()) == ("tinybase",)


def test_a_folder_is_called_by_its_last_part(tmp_path: Path) -> None:
    folder = tmp_path / "my-base"
    folder.mkdir()
    assert base_names(ServeConfig(model=str(folder))) == ("my-base",)


def test_a_hub_id_stays_whole() -> None:
    assert base_names(ServeConfig(model="org/my-base", allow_hub=True)) == ("org/my-base",)


def test_the_served_name_comes_first_and_further_names_last(tmp_path: Path) -> None:
    config = ServeConfig(model=str(tmp_path), served_model_name="prod", base_names=("org/my-base", "prod"))
    assert base_names(config) == ("prod", tmp_path.name, "org/my-base")


def test_operators_that_cannot_run_are_refused_and_leave_the_choice_as_it_was() -> None:
    before = backend._default
    with pytest.raises(ConfigError, match=r"--operators triton: .*(interpreter|triton is not installed)"):
        choose_operators(ServeConfig(operators="triton"))
    with pytest.raises(ConfigError, match="--operators is 'magic'"):
        ServeConfig(operators="magic")  # type: ignore[arg-type]
    assert backend._default == before
    choose_operators(ServeConfig(operators="reference"))
    assert use_backend(before) == "reference"


def test_graphs_are_for_cuda_with_operators_that_do_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert not can_capture(ServeConfig(), cpu)
    monkeypatch.setattr(runtime, "select", lambda device: "reference")
    assert not can_capture(ServeConfig(), cuda)
    monkeypatch.setattr(runtime, "select", lambda device: "triton")
    assert can_capture(ServeConfig(), cuda)
    assert not can_capture(ServeConfig(cuda_graphs=False), cuda)
    assert not can_capture(ServeConfig(), cpu)


@pytest.mark.anyio
async def test_a_runtime_with_graphs_serves_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wired as on a GPU, each graph a pass that is run again."""
    folder = build_tiny_model("llama", tmp_path / "base")
    async with open_runtime(folder, tmp_path / "plain") as plain:
        wanted = await plain.generate("base", range(3, 40), max_tokens=30)
    monkeypatch.setattr(runtime, "can_capture", lambda config, device: True)

    def made(*args: Any, **kwargs: Any) -> DecodeGraphs:
        return DecodeGraphs(*args, **kwargs, capture=lambda run: run)

    monkeypatch.setattr(runtime, "DecodeGraphs", made)
    replayed: list[int] = []
    run = DecodeGraphs.run
    monkeypatch.setattr(DecodeGraphs, "run", lambda self, batch: replayed.append(len(batch)) or run(self, batch))
    before = use_backend("reference")
    try:
        async with open_runtime(folder, tmp_path / "graphs") as served:
            graphs = served.engine._engine._runner.graphs
            assert graphs.row_counts[-1] == SMALL.max_num_seqs
            assert graphs.step.max_blocks == 16
            assert graphs.kv.scratch_block == served.engine.status().num_blocks_total
            found = await served.generate("base", range(3, 40), max_tokens=30)
    finally:
        use_backend(before)
    assert found.token_ids == wanted.token_ids
    assert len(replayed) >= 29
