"""The runner: which rows get logits, what it refuses, what it keeps between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaserve.adapters.delta_tables import DeltaTables
from deltaserve.engine import row_lists
from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.engine.model_runner import ModelRunner
from deltaserve.model import context
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.kv_cache import KVCache, KVLayout
from deltaserve_kernels import LoraTables
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)

IDS = [5, 9, 88, 140, 3, 3, 77, 20, 19, 6, 7, 8, 120, 33, 60, 61, 62, 63, 99]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = build_tiny_model("llama", tmp_path_factory.mktemp("base"))
    return load_base(folder, dtype=torch.float32, cache_dir=folder / "cache")


@pytest.fixture
def runner(base: BaseModel) -> ModelRunner:
    return ModelRunner(base, KVCache(base.kv_layout, 6, "cpu"), DeltaTables(LoraTables(len(base.linears), 2, "cpu")))


def test_rows_come_in_batch_order_none_last_all(base: BaseModel, runner: ModelRunner) -> None:
    wanted = base.folded_logits(torch.tensor(IDS), {})
    batch = [
        ScheduledSequence(1, IDS[:4], 0, [3], logits="all"),
        ScheduledSequence(2, IDS[:6], 0, [1], logits="none"),
        ScheduledSequence(3, IDS, 0, [5, 0], logits="last"),
    ]
    found = runner.execute(batch)
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.cat([wanted[:4], wanted[-1:]]), atol=1e-4)
    none = runner.execute([ScheduledSequence(2, IDS[6:8], 6, [1], logits="none")])
    assert none.shape == (0, base.vocab_size)
    decoded = runner.execute([ScheduledSequence(2, IDS[8:9], 8, [1]), ScheduledSequence(1, IDS[4:5], 4, [3])])
    assert torch.allclose(decoded, wanted[[8, 4]], atol=1e-4)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (ScheduledSequence(7, [], 0, [0]), "at least one token"),
        (ScheduledSequence(7, IDS, 0, [0]), "sequence 7 has 1 blocks for 19 positions"),
        (ScheduledSequence(7, IDS, 500, list(range(60))), "leave 0..512"),
        (ScheduledSequence(7, IDS, -1, [0, 1]), "leave 0..512"),
        (ScheduledSequence(7, IDS[:2], 0, [0], logits="some"), "logits 'some'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_batches_are_refused(runner: ModelRunner, sequence: ScheduledSequence, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner.execute([sequence])
    with pytest.raises(ValueError, match="at least one sequence"):
        runner.execute([])


def test_the_work_list_is_kept_while_rows_keep_their_bindings(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    build = row_lists.build_work_list_runs
    monkeypatch.setattr(
        row_lists, "build_work_list_runs", lambda *arguments: built.append(arguments) or build(*arguments)
    )
    for position in range(3):
        runner.execute(
            [ScheduledSequence(1, [4], position, [0], (ScheduledPart(0),)), ScheduledSequence(2, [4], 0, [1])]
        )
    assert len(built) == 1
    runner.execute([ScheduledSequence(1, [4], 3, [0], (ScheduledPart(1),)), ScheduledSequence(2, [4], 0, [1])])
    runner.execute([ScheduledSequence(1, [4], 4, [0], ((1, 1.0, 1.0, 0),))])
    runner.execute([ScheduledSequence(1, [4], 5, [0])])
    assert [arguments[0] for arguments in built] == [
        [(0, 1, ((0, 1.0, 1.0),))],
        [(0, 1, ((1, 1.0, 1.0),))],
        [(0, 1, ((1, 1.0, 1.0),))],
    ]


def test_a_part_that_joins_later_is_in_the_rows_from_there_on_and_not_before(runner: ModelRunner) -> None:
    parts = (ScheduledPart(0), ScheduledPart(1, 0.5, 0.5, 2))
    seen = []
    for position in (1, 2, 3, 1):
        runner.execute([ScheduledSequence(1, [4], position, [0], parts)])
        seen.append(runner.row_lists.last.runs)
    alone, both = [(0, 1, ((0, 1.0, 1.0),))], [(0, 1, ((0, 1.0, 1.0), (1, 0.5, 0.5)))]
    assert seen == [alone, both, both, alone]
    runner.execute([ScheduledSequence(1, IDS[:3], 0, [0], parts)])
    assert runner.row_lists.last.runs == [(0, 2, ((0, 1.0, 1.0),)), (2, 1, both[0][2])]


def test_warm_up_leaves_a_clean_cache(base: BaseModel) -> None:
    for num_blocks in (1, 4):
        runner = ModelRunner(base, KVCache(base.kv_layout, num_blocks, "cpu"))
        runner.warm_up()
        assert not runner.kv.pool.any()


def test_a_pass_needs_a_context_and_passes_do_not_nest(base: BaseModel) -> None:
    with pytest.raises(RuntimeError, match="outside a forward pass"):
        base.linear(base.linears[0])(torch.zeros(1, 64))
    with (
        context.use(context.FoldedContext(deltas={})),
        pytest.raises(RuntimeError, match="already running"),
    ):
        base.folded_logits(torch.tensor([3]), {})


def test_kv_pages_hold_a_block_of_all_layers() -> None:
    layout = KVLayout(num_layers=3, kv_heads=2, head_dim=8, dtype=torch.bfloat16)
    cache = KVCache(layout, 5, "cpu")
    assert cache.pool.numel() * 2 == 5 * layout.block_bytes
    assert cache.k(1).shape == (5, 2, 16, 8)
    cache.v(2)[4, 1, 15, 7] = 1.0
    assert cache.pool[4, 2, 1, 1, 15, 7] == 1.0
    roomy = KVCache(layout, 5, "cpu", has_scratch=True)
    assert (cache.scratch_block, roomy.num_blocks, roomy.scratch_block) == (None, 5, 5)
    assert roomy.k(0).shape == (6, 2, 16, 8)
    with pytest.raises(ValueError, match="num_blocks is 0"):
        KVCache(layout, 0, "cpu")
