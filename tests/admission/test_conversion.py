"""Deltas of high rank: served exactly where that is affordable, else as the best term, with what that costs stated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.admission.conversion import Conversion, refusal, scale_for
from deltaserve.admission.evidence import Evidence
from deltaserve.config import EngineConfig, ServeConfig
from deltaserve.deltas.fold import dense_delta
from deltaserve.errors import AdapterRefused
from deltaserve.model.base import BaseModel
from deltaserve.runtime import Runtime
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.peft_kinds import low_rank
from deltaserve_store.formats.peft_kinds.low_rank import ConversionLimits, best, whole
from deltatest.admission_rig import Rig, open_rig, run
from deltatest.peft_kinds import make_kind

TINY = ConversionLimits(exact_rank=24, rank=24)
LOSSY = {
    "fourierft-many": {},
    "waveft-full": {},
    "c3a": {},
    "randlora": {},
    "hira": {},
    "miss-bat": {},
    "loha": {"r": 6},
    "lokr-whole": {},
}


@pytest.fixture(scope="module")
def lossy(hf_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lossy")
    return {name: make_kind(hf_model, root / name, name, seed=9, **options) for name, options in LOSSY.items()}


@pytest.fixture
def open_door(base: BaseModel, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    opened: list[Rig] = []

    def door(**options: Any) -> Rig:
        opened.append(open_rig(base, tmp_path / f"store-{len(opened)}", **options))
        return opened[-1]

    yield door
    for rig in opened:
        rig.close()


def _parsed(folder: Path, base: BaseModel, limits: ConversionLimits) -> Any:
    def weight_of(name: str) -> torch.Tensor:
        return base.linear(name).rows(0, base.spec.linears[name].out_features)

    return read_adapter(folder, base.spec, limits).on_base(weight_of)


@pytest.mark.parametrize("name", LOSSY)
def test_the_term_is_the_nearest_of_its_rank(name: str, base: BaseModel, lossy: dict[str, Path]) -> None:
    """Eckart and Young: what it misses is the norm of the singular values left out, and no less is possible."""
    exact = _parsed(lossy[name], base, ConversionLimits())
    near = _parsed(lossy[name], base, TINY)
    assert not exact.lossy_deltas
    assert near.lossy_deltas
    assert near.rank <= TINY.rank
    for delta in near.lossy_deltas:
        wanted = dense_delta(exact, delta.module, base.spec)
        assert torch.equal(dense_delta(near, delta.module, base.spec), wanted)
        kept = dense_delta(near, delta.module, base.spec, as_served=True)
        left_out = torch.linalg.svdvals(wanted.double())[delta.rank :].norm()
        assert float((kept.double() - wanted).norm()) == pytest.approx(float(left_out), rel=1e-4, abs=1e-6)
        assert float((kept - wanted).abs().max()) > 1e-4


@pytest.mark.parametrize("name", LOSSY)
def test_the_error_is_measured_and_above_the_limit_refused(
    name: str, base: BaseModel, lossy: dict[str, Path], open_door: Callable[..., Rig]
) -> None:
    strict = open_door(conversion_limits=TINY, conversion_error=0.001)
    with pytest.raises(AdapterRefused) as caught:
        run(strict.admit(lossy[name]))
    (reason,) = caught.value.reasons
    assert (reason.code, reason.where) == ("conversion_error", "logits")
    assert "rank 24" in reason.found
    assert "--conversion-rank" in reason.allowed
    assert strict.is_clean()

    lenient = open_door(conversion_limits=TINY, conversion_error=1.0)
    result = run(lenient.admit(lossy[name]))
    conversion = result.evidence.conversion
    assert conversion is not None
    # An independent look: the same two adapters folded here.
    ids = torch.arange(40) % base.vocab_size
    exact, near = _parsed(lossy[name], base, ConversionLimits()), _parsed(lossy[name], base, TINY)
    deltas = {d.module: dense_delta(exact, d.module, base.spec) for d in exact.deltas}
    kept = {d.module: dense_delta(near, d.module, base.spec, as_served=True) for d in near.deltas}
    logits = [base.folded_logits(ids, {k: (lambda v=v: v) for k, v in part.items()}) for part in (deltas, kept)]
    error = float((logits[0] - logits[1]).abs().max())
    assert 0.2 * error < conversion.error < 5 * error, "of the size that other tokens show"
    assert conversion.error <= conversion.limit == conversion.effect
    assert any(f"{conversion.error:.3g}" in warning for warning in result.warnings)
    stored = lenient.store.get_evidence(result.record.version, str(result.evidence.key))
    assert stored is not None
    assert stored["conversion"]["error"] == conversion.error
    assert Evidence.from_dict(stored) == result.evidence
    assert result.evidence.max_error <= result.evidence.tolerance, "the engine runs the terms as they are"


def test_exact_adapters_carry_no_conversion(rig: Rig, lossy: dict[str, Path]) -> None:
    """At the usual limits nothing of a small base is approximated, and nothing is said."""
    result = run(rig.admit(lossy["c3a"]))
    assert (result.evidence.conversion, result.warnings) == (None, ())


def test_a_weak_adapter_is_judged_by_its_own_effect(
    hf_model: Any, tmp_path: Path, open_door: Callable[..., Rig]
) -> None:
    """Its error drowns in rounding at scale 1; at the scale where the effect is clear it does not pass."""
    weak = make_kind(hf_model, tmp_path / "weak", "c3a", std=1e-4)
    with pytest.raises(AdapterRefused) as caught:
        run(open_door(conversion_limits=TINY).admit(weak))
    assert caught.value.reasons[0].code == "conversion_error"
    assert "at scale" in caught.value.reasons[0].found


def test_scales_and_refusals() -> None:
    assert scale_for(1.0, 0.05, 1e-4, 4096.0) == 1.0
    assert scale_for(1e-3, 0.05, 1e-4, 4096.0) == 2.0
    assert scale_for(1e-9, 0.05, 1e-4, 4096.0) == 4096.0
    assert scale_for(0.0, 0.05, 1e-4, 4096.0) == 1.0
    good = Conversion(scale=1.0, error=0.1, effect=4.0, limit=0.2, rank=8, num_linears=3)
    assert refusal(good) is None
    bad = replace(good, error=0.3)
    reason = refusal(bad)
    assert reason is not None
    assert "0.3" in reason.found
    assert "0.2" in reason.allowed


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_whole_terms_multiply_to_the_delta_itself(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a, b = whole(delta)
    assert a.shape[0] == b.shape[1] == min(shape)
    assert torch.equal(b @ a, delta)


def test_large_matrices_get_nearly_the_best_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subspace iteration against the decomposition, on a spectrum that falls and on one that hardly does."""
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(n, 120, generator=generator)).Q for n in (300, 200))
    for weights in (0.9 ** torch.arange(120.0), 1 - torch.arange(120.0) / 400):
        delta = left * weights @ right.t()
        monkeypatch.setattr(low_rank, "_WHOLE_SIZE", 16)
        a, b, is_exact = best(delta, 20)
        assert not is_exact
        assert a.shape == (20, 200)
        assert float((b @ a - delta).norm()) < 1.01 * float(weights[20:].norm())
        again = best(delta, 20)
        assert torch.equal(a, again[0])
    zero = best(torch.zeros(30, 40), 4)
    assert float((zero[1] @ zero[0]).abs().max()) == 0.0
    a, b, is_exact = best(torch.ones(30, 40), 4)
    assert (a.shape[0], is_exact) == (1, True), "directions that are rounding are left out"
    assert torch.allclose(b @ a, torch.ones(30, 40), atol=1e-6)


@pytest.mark.parametrize(("exact_rank", "rank"), [(8, 9), (0, 0), (2000, 8)])
def test_limits_that_make_no_sense(exact_rank: int, rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        ConversionLimits(exact_rank, rank)


def test_the_limit_is_what_the_server_holds_of_one_adapter(tmp_path: Path) -> None:
    engine = EngineConfig(adapter_device_bytes=3000, adapter_host_bytes=2000)
    runtime = Runtime.open(
        ServeConfig(store=tmp_path / "store", dtype="bfloat16", conversion_flops=5e12, engine=engine)
    )
    try:
        limits = runtime.admission._conversion_limits
        assert limits == ConversionLimits(max_bytes=2000, itemsize=2, max_flops=5e12)
        assert ServeConfig().conversion_flops == ConversionLimits().max_flops
    finally:
        runtime.admission.close()
        runtime.store.close()


def test_terms_that_would_not_fit_are_refused_at_the_door(
    hf_model: Any, tmp_path: Path, open_door: Callable[..., Rig]
) -> None:
    folder = make_kind(hf_model, tmp_path / "vera", "vera")
    door = open_door(conversion_limits=ConversionLimits(max_bytes=5000, itemsize=4))
    with pytest.raises(AdapterRefused) as caught:
        run(door.admit(folder))
    (reason,) = caught.value.reasons
    assert (reason.code, reason.where) == ("conversion_too_large", "adapter_config.json")
    assert "at most 5000 bytes" in reason.allowed
    assert "--adapter-device-bytes" in reason.allowed
    assert door.is_clean()
