"""Groups that go by tables and lists alone give what groups give that find their rows on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaserve.engine.batch import ScheduledPart, ScheduledSequence
from deltaserve.model.base import BaseModel, load_base
from deltaserve.model.context import ForwardContext
from deltaserve_kernels import (
    ApartEntries,
    ApartFamily,
    ApartRows,
    ApartStep,
    apart_rows,
    build_work_list,
    split_apart,
    use_backend,
)
from deltatest.apart_cases import full, module, packed
from deltatest.graph_rig import GraphRig
from deltatest.kernel_cases import Parts, randn
from deltatest.tiny_models import build_tiny_model

# Slot 0: a difference and modules, one of them parallel; slot 1: a difference; slot 2: a module.
BINDINGS: list[Parts] = [(), ((0, 1.0, 0.5),), ((1, 2.0, 2.0),), ((1, 0.5, 1.0), (2, -1.0, 1.0)), ((0, 0.0, 0.0),)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    root = tmp_path_factory.mktemp("apart-rows")
    folder: Path = build_tiny_model("qwen2", root / "base")
    return load_base(folder, dtype=torch.float32, cache_dir=root / "cache")


@pytest.mark.parametrize("has_residual", [False, True])
def test_a_sublayer_by_lists_equals_one_by_items(base: BaseModel, has_residual: bool) -> None:
    size = base.spec.hidden_size
    names = [name for name in base.linears if name.startswith("model.layers.0.self_attn")]
    first, last = (base.linear(name).group for name in (names[0], names[-1]))
    point_in, point_out = first.ends.changes, last.ends.gives
    assert point_in >= 0
    assert point_out == point_in + 1
    family = ApartFamily(len(base.linears), len(base.points), 3)
    linear = last.members[0].linear
    family.set_all(
        0,
        ApartEntries(
            ((linear, full(size, size, 1)),),
            ((point_in, module(size, 4, "gelu", 2)), (point_out, module(size, 3, "silu", 3, reads=point_in))),
        ),
    )
    family.set_all(1, ApartEntries(((linear, packed(size, size, 4)),)))
    family.set_all(2, ApartEntries(modules=((point_out, module(size, 2, "relu", 5)),)))
    work = build_work_list(BINDINGS)
    runs = [(row, 1, parts) for row, parts in enumerate(BINDINGS) if parts]
    rows, between = randn(len(BINDINGS), size, seed=6), randn(len(BINDINGS), size, seed=7)
    residual = randn(len(BINDINGS), size, seed=8) if has_residual else None
    results = []
    before = use_backend("reference")
    try:
        for step in (split_apart(runs, family), ApartRows(family, work)):
            ctx = _context(work, step)
            given = first.apply(rows, ctx)
            stream = None if residual is None else residual.clone()
            results.append((given, last.apply(between, ctx, stream)))
    finally:
        use_backend(before)
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert torch.equal(found[[0, 2, 4]], wanted[[0, 2, 4]])  # rows without a module
        assert not torch.equal(found[1], found[4])


def _context(work, step) -> ForwardContext:  # type: ignore[no-untyped-def]
    nothing = torch.empty(0, dtype=torch.int64)
    return ForwardContext(
        positions=nothing,
        cu_seqlens_q=nothing,
        kv_lens=nothing,
        block_tables=nothing,
        kv_index=nothing,
        kv=None,  # type: ignore[arg-type]
        work=work,
        apart=step,
    )


def test_a_slot_that_holds_another_adapter_is_met_anew(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two adapters with modules in one binding take the other form, also in a step that looks like the one before."""
    monkeypatch.setattr(apart_rows, "select", lambda _: "triton")
    before = use_backend("reference")
    try:
        rig = GraphRig(base, has_apart=True, row_counts=[2], capture_now=False)
        rig.fill(0, ("modules",), share=1.0)
        rig.fill(1, ("dense",), share=1.0)
        batch = [ScheduledSequence(0, [7], 3, [1], (ScheduledPart(0), ScheduledPart(1)))]
        first = rig.eager.execute(batch)
        assert isinstance(rig.eager.row_lists.last.apart, ApartRows)
        rig.clear(1)
        rig.fill(1, ("modules",), share=1.0)
        found = rig.eager.execute(batch)
        fresh = rig.new_runner()
        assert torch.equal(found, fresh.execute(batch))
        assert isinstance(rig.eager.row_lists.last.apart, ApartStep)
        assert not torch.equal(found, first)
    finally:
        use_backend(before)
