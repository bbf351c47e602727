"""The door: what passes is committed with its proof, what does not is refused with reasons and changes nothing."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltaserve.core import Binding
from deltaserve.deltas import folded as folded_module
from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve.errors import AdapterRefused, Conflict, InvalidRequest, QueueFull, StorageFull
from deltaserve.model.base import BaseModel
from deltaserve.runtime import operators_key
from deltaserve_kernels import source_digest
from deltaserve_store.errors import BaseMismatch
from deltatest.admission_rig import BASE_NAME, Rig, open_rig, run
from deltatest.of_kind import one_of
from deltatest.peft_adapters import edit_config, make_peft_lora, make_sparse


def codes(error: AdapterRefused) -> set[str]:
    return {reason.code for reason in error.reasons}


@pytest.mark.parametrize("kind", ["lora-0", "shira", "sparse", "dora", "ia3", "norms", "bitfit"])
def test_what_passes_is_committed_with_its_proof(rig: Rig, shelf: Path, kind: str) -> None:
    result = run(rig.admit(shelf / kind, "poet", source="test"))
    assert result.created
    record = rig.store.get("default", "poet")
    assert record.version == result.record.version
    assert (record.effect, record.source, record.waivers) == (result.evidence.effect, "test", ())
    assert result.evidence.effect > 0.1 > result.evidence.tolerance
    path = rig.proven.locate(record.version)
    assert path is not None
    assert FoldedAdapter.load(path, rig.base.spec, torch.float32).nbytes > 0
    assert rig.proven.evidence(record.version) == result.evidence
    assert rig.engine.names.resolve("default", "poet").version == record.version
    assert rig.is_clean()


def test_the_same_bytes_again_cost_no_proof(rig: Rig, shelf: Path) -> None:
    async def twice() -> None:
        first = await rig.admit(shelf / "lora-0")
        probes = rig.engine.num_probes
        second = await rig.admit(shelf / "lora-0")
        assert (second.created, second.record.version) == (False, first.record.version)
        assert second.evidence == first.evidence
        other_name = await rig.admit(shelf / "lora-0", "b")
        assert other_name.created
        assert rig.engine.num_probes == probes

    run(twice())


def test_the_same_bytes_again_mend_damaged_files(rig: Rig, shelf: Path) -> None:
    async def steps() -> None:
        version = (await rig.admit(shelf / "lora-0")).record.version
        path = rig.store.version_dir(version) / "adapter_model.safetensors"
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        again = await rig.admit(shelf / "lora-0")
        assert (again.record.version, again.record.state) == (version, "stored")
        assert path.read_bytes() == good
        assert rig.store.verify(version) == ()

    run(steps())


def test_a_new_version_moves_the_name_and_old_bytes_move_it_back(rig: Rig, shelf: Path) -> None:
    async def steps() -> None:
        one = await rig.admit(shelf / "lora-0")
        two = await rig.admit(shelf / "lora-1")
        assert rig.engine.names.resolve("default", "a").version == two.record.version
        back = await rig.admit(shelf / "lora-0")
        assert (back.created, back.record.version) == (False, one.record.version)
        assert rig.engine.names.resolve("default", "a").version == one.record.version

    run(steps())


def test_expected_version(rig: Rig, shelf: Path) -> None:
    async def steps() -> None:
        with pytest.raises(Conflict, match="none"):
            await rig.admit(shelf / "lora-0", expected_version="a" * 64)
        one = await rig.admit(shelf / "lora-0", expected_version="none")
        probes = rig.engine.num_probes
        with pytest.raises(Conflict, match=one.record.version):
            await rig.admit(shelf / "lora-1", expected_version="none")
        assert rig.engine.num_probes == probes
        await rig.admit(shelf / "lora-1", expected_version=one.record.version[:12])

    run(steps())


def test_base_names_and_waivers(rig: Rig, shelf: Path) -> None:
    async def steps() -> None:
        with pytest.raises(AdapterRefused) as caught:
            await rig.admit(shelf / "other-base")
        assert caught.value.error_code == "base_mismatch"
        (reason,) = caught.value.reasons
        assert (reason.code, reason.where, reason.found) == (
            "base_mismatch",
            "base_model_name_or_path",
            "'somebody/else'",
        )
        assert BASE_NAME in reason.allowed
        waived = await rig.admit(shelf / "other-base", accept_base=True)
        assert waived.record.waivers == ("base",)
        again = await rig.admit(shelf / "other-base")
        assert not again.created
        named = await rig.admit(shelf / "lora-0", accept_base=True)
        assert named.record.waivers == ()

    run(steps())


def test_a_foreign_fingerprint_is_never_waived(rig: Rig, tmp_path: Path) -> None:
    foreign = make_sparse(rig.base.spec, tmp_path / "foreign", fingerprint="e" * 64)
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admit(foreign, accept_base=True))
    assert caught.value.error_code == "base_mismatch"


def test_an_adapter_without_a_base_name_is_refused(rig: Rig, hf_model: torch.nn.Module, tmp_path: Path) -> None:
    folder = edit_config(make_peft_lora(hf_model, tmp_path / "a"), base_model_name_or_path=None)
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admit(folder))
    assert codes(caught.value) == {"base_mismatch"}


def test_no_effect_is_refused_unless_waived(rig: Rig, shelf: Path) -> None:
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admit(shelf / "zero"))
    assert codes(caught.value) == {"no_effect"}
    assert rig.is_clean()
    result = run(rig.admit(shelf / "zero", accept_no_effect=True))
    assert (result.record.waivers, result.record.effect) == (("no_effect",), 0.0)
    assert result.warnings


def test_chat_templates_must_be_registered(base: BaseModel, rig: Rig, tmp_path: Path) -> None:
    folder = make_sparse(base.spec, tmp_path / "chat", chat_template="chatml", stop_token_ids=[5])
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admit(folder))
    assert codes(caught.value) == {"unknown_chat_template"}
    knowing = open_rig(base, tmp_path / "other", chat_templates=("chatml",))
    result = run(knowing.admit(folder))
    assert (result.record.chat_template, result.record.stop_token_ids) == ("chatml", (5,))
    knowing.close()


@pytest.mark.parametrize("name", ["", "a/b", "..", "tiny/x", "a b", "x" * 65])
def test_malformed_names_are_refused_before_anything_is_read(rig: Rig, name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        run(rig.admission.admit(tmp_path / "missing", name=name))


def test_a_name_of_the_base_is_taken(rig: Rig, shelf: Path) -> None:
    with pytest.raises(Conflict) as caught:
        run(rig.admit(shelf / "lora-0", "tiny"))
    assert caught.value.error_code == "name_taken"
    assert rig.is_clean()


def test_a_runtime_that_differs_from_folded_weights_is_refused(
    rig: Rig, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folded file is wrong in one scaling, with a digest that fits it: only the proof can tell."""
    true_save = FoldedAdapter.save

    def save_wrong(self: FoldedAdapter, path: Path) -> None:
        name = list(self.terms)[-1]
        term = one_of(LowRankTerm, self.terms[name])
        wrong = replace(term, b_t=term.b_t * 1.02)
        true_save(replace(self, terms={**self.terms, name: (wrong,)}), path)

    monkeypatch.setattr(FoldedAdapter, "save", save_wrong)
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admit(shelf / "lora-0"))
    assert codes(caught.value) == {"proof_failed"}
    assert rig.store.list("default") == ()
    assert rig.engine.published == []
    assert rig.is_clean()


def test_not_a_number_in_the_answer_is_refused(rig: Rig, shelf: Path) -> None:
    def poison(binding: Binding, logits: torch.Tensor) -> torch.Tensor:
        return logits if binding.is_base else logits.where(logits != logits.max(), torch.nan)

    rig.engine.on_probe = poison
    with pytest.raises(AdapterRefused) as caught:
        run(rig.admit(shelf / "lora-0"))
    assert codes(caught.value) == {"non_finite_output"}
    assert rig.store.list("default") == ()


def test_an_engine_that_fails_leaves_nothing_behind(rig: Rig, shelf: Path) -> None:
    def fail(binding: Binding, logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the engine died")

    rig.engine.on_probe = fail
    with pytest.raises(RuntimeError, match="died"):
        run(rig.admit(shelf / "lora-0"))
    assert rig.store.list("default") == ()
    assert rig.is_clean()


def test_a_quota_that_is_used_up_says_so(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    small = open_rig(base, tmp_path / "small", quota_bytes=40_000)
    with pytest.raises(StorageFull) as caught:
        run(small.admission.admit(shelf / "lora-3", name="a"))
    assert caught.value.status == 507
    assert small.store.list("default") == ()
    assert small.is_clean()
    small.close()


@pytest.mark.parametrize("step", ["build-made", "manifest-written", "renamed", "rows-written"])
def test_a_full_disk_says_so_and_the_door_goes_on(base: BaseModel, shelf: Path, tmp_path: Path, step: str) -> None:
    full = [True]

    def on_step(name: str) -> None:
        if name == step and full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    rig = open_rig(base, tmp_path / "full", on_step=on_step)
    with pytest.raises(StorageFull):
        run(rig.admit(shelf / "lora-0"))
    assert rig.store.list("default") == ()
    assert rig.is_clean()
    full[0] = False
    assert run(rig.admit(shelf / "lora-0")).created
    rig.close()


def test_a_disk_that_fills_while_folding_says_so(rig: Rig, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(self: FoldedAdapter, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FoldedAdapter, "save", no_space)
    with pytest.raises(StorageFull):
        run(rig.admit(shelf / "lora-0"))
    assert rig.is_clean()


def test_a_queue_that_is_full_says_so(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    narrow = open_rig(base, tmp_path / "narrow", max_waiting=2)

    async def crowd() -> list[object]:
        jobs = [narrow.admit(shelf / f"lora-{i}", f"n{i}") for i in range(4)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    outcomes = run(crowd())
    assert [isinstance(outcome, QueueFull) for outcome in outcomes].count(True) == 2
    assert len(narrow.store.list("default")) == 2
    assert narrow.is_clean()
    narrow.close()


def test_prepare_is_quick_when_all_is_there_and_repairs_what_is_not(rig: Rig, shelf: Path) -> None:
    async def steps() -> None:
        version = (await rig.admit(shelf / "lora-0")).record.version
        probes = rig.engine.num_probes
        await rig.admission.prepare(version)
        assert rig.engine.num_probes == probes
        path = rig.proven.locate(version)
        assert path is not None
        damaged = bytearray(path.read_bytes())
        damaged[-20] ^= 1
        path.write_bytes(damaged)
        await rig.admission.prepare(version)
        assert rig.engine.num_probes == probes + 1
        FoldedAdapter.load(path, rig.base.spec, torch.float32)
        path.unlink()
        assert rig.proven.locate(version) is None
        await rig.admission.prepare(version)
        assert rig.proven.locate(version) == path
        assert rig.is_clean()

    run(steps())


def test_another_dtype_or_operator_version_is_proven_again(
    load: Callable[[torch.dtype], BaseModel], base: BaseModel, shelf: Path, tmp_path: Path
) -> None:
    first = open_rig(base, tmp_path / "store")
    version = run(first.admit(shelf / "other-base", accept_base=True)).record.version
    first.close()
    for dtype, operators in ((torch.float32, "test-2"), (torch.bfloat16, "test-1")):
        later = open_rig(load(dtype), tmp_path / "store", operators=operators)
        assert later.proven.locate(version) is None
        run(later.admission.prepare(version))
        evidence = later.proven.evidence(version)
        assert evidence is not None
        assert (evidence.dtype, evidence.operators) == (str(dtype).removeprefix("torch."), operators)
        path = later.proven.locate(version)
        assert path is not None
        assert FoldedAdapter.load(path, later.base.spec, dtype).dtype == dtype
        later.close()


def test_evidence_of_other_operator_code_counts_as_none(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    """A store proven by earlier releases, whose key named the release alone, and with another source since."""
    device = torch.device("cpu")
    now = operators_key(device)
    assert source_digest()[:16] in now
    before = (now.replace(f"-{source_digest()[:16]}", ""), now.replace(source_digest()[:16], "0" * 16))
    assert now not in before
    for number, operators in enumerate(before):
        path = tmp_path / f"store-{number}"
        old = open_rig(base, path, operators=operators)
        version = run(old.admit(shelf / "lora-0")).record.version
        assert old.proven.locate(version) is not None
        old.close()
        later = open_rig(base, path, operators=now)
        assert later.proven.evidence(version) is None
        assert later.proven.locate(version) is None
        again = run(later.admit(shelf / "lora-0"))  # the same bytes are proven, not taken on the old proof
        assert (again.created, later.engine.num_probes) == (False, old.engine.num_probes)
        assert again.evidence.operators == now
        assert later.proven.locate(version) is not None
        later.close()


def test_another_fold_version_is_folded_and_proven_again(
    base: BaseModel, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_rig(base, tmp_path / "store")
    version = run(first.admit(shelf / "lora-0")).record.version
    first.close()
    for module in (folded_module, __import__("deltaserve.deltas.fold", fromlist=["x"])):
        monkeypatch.setattr(module, "FOLD_VERSION", 99)
    monkeypatch.setattr("deltaserve.admission.derived.FOLD_VERSION", 99)
    later = open_rig(base, tmp_path / "store")
    assert later.proven.locate(version) is None
    run(later.admission.prepare(version))
    assert later.proven.locate(version) is not None
    later.close()


def test_versions_of_another_base_are_not_prepared(base: BaseModel, shelf: Path, tmp_path: Path) -> None:
    first = open_rig(base, tmp_path / "store")
    own = run(first.admit(shelf / "sparse", "own")).record.version
    named = run(first.admit(shelf / "lora-0", "named")).record.version
    waived = run(first.admit(shelf / "other-base", "waived", accept_base=True)).record.version
    first.close()
    spec = base.spec
    try:
        base.spec = replace(spec, fingerprint="d" * 64)
        later = open_rig(base, tmp_path / "store")
        for version in (own, waived):
            with pytest.raises(BaseMismatch):
                run(later.admission.prepare(version))
            assert later.proven.locate(version) is None
        run(later.admission.prepare(named))
        assert later.proven.locate(named) is not None
        later.close()
    finally:
        base.spec = spec


def test_names_move_through_the_door_too(rig: Rig, shelf: Path) -> None:
    async def steps() -> None:
        one = await rig.admit(shelf / "lora-0")
        two = await rig.admit(shelf / "lora-1")
        await rig.admission.alias("default", "best", "a")
        assert rig.engine.names.resolve("default", "best").version == two.record.version
        await rig.admission.rollback("default", "a")
        assert rig.engine.names.resolve("default", "best").version == one.record.version
        with pytest.raises(Conflict):
            await rig.admission.delete("default", "a")
        await rig.admission.delete("default", "best")
        await rig.admission.delete("default", "a")
        assert rig.engine.names.names("default") == ()

    run(steps())
