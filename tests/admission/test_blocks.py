"""Row and column blocks end to end: upload, proof, the same answers after eviction and reload, and no wrong block."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.deltas import fold as fold_module
from deltaserve.errors import AdapterRefused
from deltaserve.model.base import BaseModel
from deltatest.admission_rig import Rig, run
from deltatest.block_adapters import KINDS, make_blocks
from deltatest.runtime_factory import SMALL, open_runtime

PROMPT = tuple(range(50, 90))


def test_every_kind_lives_through_upload_serving_eviction_and_reload(base: BaseModel, tmp_path: Path) -> None:
    async def ask(names: tuple[str, ...]) -> list[list[int]]:
        jobs = [runtime.generate(name, PROMPT, 10) for name in names]
        return [answer.token_ids for answer in await asyncio.wait_for(asyncio.gather(*jobs), 120)]

    async def steps() -> None:
        nonlocal runtime
        async with open_runtime(base, tmp_path / "store", limits=replace(SMALL, adapter_slots=2)) as runtime:
            for seed, kind in enumerate(KINDS):
                result = await runtime.admit(make_blocks(kind, base.spec, tmp_path / kind, seed=seed), kind)
                assert result.evidence.max_error <= result.evidence.tolerance
                assert result.evidence.effect > 10 * result.evidence.tolerance
                assert result.record.kinds == ("block",)
            first = await ask(("tiny", *KINDS))
            assert len({tuple(answer) for answer in first}) == 5
            assert [(await ask((name,)))[0] for name in ("tiny", *KINDS)] == first
        async with open_runtime(base, tmp_path / "store") as runtime:
            assert await ask(("tiny", *KINDS)) == first

    runtime: Any = None
    run(steps())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_are_proven_in_narrow_dtypes(
    load: Callable[[torch.dtype], BaseModel], tmp_path: Path, dtype: torch.dtype
) -> None:
    async def steps() -> None:
        async with open_runtime(load(dtype), tmp_path / "store") as runtime:
            for kind in KINDS:
                folder = make_blocks(kind, runtime.base.spec, tmp_path / kind, std=0.1)
                result = await runtime.admit(folder, kind)
                assert result.evidence.max_error <= result.evidence.tolerance

    run(steps())


def test_a_block_at_the_wrong_rows_does_not_pass_the_door(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fold_module.fold_block
    monkeypatch.setattr(fold_module, "fold_block", lambda *a: replace(made(*a), d=made(*a).d.roll(1, 0)))
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admit(make_blocks("rows", rig.base.spec, tmp_path / "rows"), "rows"))
    assert [reason.code for reason in caught.value.reasons] == ["proof_failed"]
