"""Converted PEFT types end to end: upload, proof, answers equal to PEFT's beside others, eviction and reload."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve.errors import AdapterRefused
from deltaserve.model.base import BaseModel
from deltaserve_store.formats.peft_kinds import reader as reader_module
from deltaserve_store.parsed import FunctionDelta, LoraDelta, SparseDelta, WeightDelta
from deltatest.admission_rig import Rig, run
from deltatest.peft_adapters import peft_greedy
from deltatest.peft_kinds import CASES, make_kind
from deltatest.runtime_factory import SMALL, open_runtime

PROMPT = (5, 17, 60, 2, 9, 41, 88, 5)


@pytest.fixture(scope="module")
def kinds(hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: make_kind(hf_model, root / name, name, seed=index) for index, name in enumerate(CASES)}


def _one_of_each() -> list[str]:
    """The first case of every type: the others differ in their conversion, not in what happens to a folded adapter."""
    first: dict[str, str] = {}
    for name, case in CASES.items():
        first.setdefault(case.config, name)
    return list(first.values())


def test_every_kind_lives_through_upload_serving_eviction_and_reload(
    base: BaseModel, hf_model: Any, kinds: dict[str, Path], tmp_path: Path
) -> None:
    """Two slots for all kinds: every wave of requests evicts what the wave before has loaded, and answers the same."""
    kinds = {name: kinds[name] for name in _one_of_each()}

    async def ask_all() -> list[list[int]]:
        jobs = [runtime.generate(name, PROMPT, 12) for name in ("tiny", *kinds)]
        return [answer.token_ids for answer in await asyncio.wait_for(asyncio.gather(*jobs), 120)]

    async def steps() -> None:
        nonlocal runtime
        async with open_runtime(base, tmp_path / "store", limits=replace(SMALL, adapter_slots=2)) as runtime:
            versions = {}
            for name, folder in kinds.items():
                result = await runtime.admit(folder, name)
                assert result.evidence.max_error <= result.evidence.tolerance
                assert result.evidence.effect > 10 * result.evidence.tolerance, f"{name} has no effect to prove"
                assert any("singular vectors" in told for told in result.warnings) == (name == "psoft")
                versions[name] = result.record.version
            first = await ask_all()
            assert first == [peft_greedy(hf_model, folder, PROMPT, 12) for folder in (None, *kinds.values())]
            assert await ask_all() == first
        async with open_runtime(base, tmp_path / "store") as runtime:
            assert await ask_all() == first
            for name, folder in kinds.items():
                again = await runtime.admit(folder, name)
                assert (again.created, again.record.version) == (False, versions[name])

    runtime: Any = None
    run(steps())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_is_proven_in_narrow_dtypes(
    load: Callable[[torch.dtype], BaseModel], kinds: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    async def steps() -> None:
        async with open_runtime(load(dtype), tmp_path / "store") as runtime:
            for name, folder in kinds.items():
                result = await runtime.admit(folder, name)
                assert result.evidence.max_error <= result.evidence.tolerance

    run(steps())


@pytest.mark.parametrize("name", CASES)
def test_reloading_is_bit_for_bit(rig: Rig, kinds: dict[str, Path], name: str) -> None:
    """The folded file is what serving loads again after an eviction: it holds the same bits as a fresh fold."""
    from deltaserve.deltas.fold import fold

    version = run(rig.admit(kinds[name], "a")).record.version
    path = rig.proven.locate(version)
    assert path is not None
    loaded = FoldedAdapter.load(path, rig.base.spec, torch.float32)
    fresh = fold(rig.admission._read(kinds[name]), rig.base.spec, torch.float32)
    assert set(loaded.terms) == set(fresh.terms)
    for module, terms in fresh.terms.items():
        for one, other in zip(terms, loaded.terms[module], strict=True):
            for part in ("a", "b_t") if isinstance(one, LowRankTerm) else ("indptr", "cols", "values"):
                assert torch.equal(getattr(one, part), getattr(other, part))


def test_a_wrong_conversion_does_not_pass_the_door(
    rig: Rig, kinds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof's oracle is the method's own formula: a conversion that loses a factor is found, whatever the kind."""
    convert = reader_module.convert_one

    def lossy(*arguments: Any) -> Any:
        made = convert(*arguments)
        return tuple(half(delta) for delta in made) if isinstance(made, tuple) else half(made)

    def half(delta: Any) -> Any:
        if isinstance(delta, WeightDelta):
            return replace(delta, right=delta.right * 0.5)
        if isinstance(delta, FunctionDelta):
            return replace(delta, parts=tuple(part * 0.5 for part in delta.parts))
        if isinstance(delta, SparseDelta):
            return replace(delta, values=delta.values * 0.5)
        return replace(delta, scaling=delta.scaling * 0.5) if isinstance(delta, LoraDelta) else delta

    monkeypatch.setattr(reader_module, "convert_one", lossy)
    for name, folder in kinds.items():
        if name.startswith("supertuning"):
            continue
        with pytest.raises(AdapterRefused) as caught:
            run(rig.admit(folder, name))
        assert [reason.code for reason in caught.value.reasons] == ["proof_failed"], name
