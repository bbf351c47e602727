"""The proof must pass what is applied right, and must fail what is applied wrong: each fault here is injected."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltaserve.admission import proof
from deltaserve.admission.evidence import Evidence, ProofKey
from deltaserve.admission.proof import MAX_PROBE_TOKENS, NonFiniteOutput, Prover, judge, probe_ids
from deltaserve.core import Binding
from deltaserve.deltas.fold import fold
from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm
from deltaserve.deltas.vector_terms import VectorTerm
from deltaserve.model.base import BaseModel, load_base
from deltaserve_store.formats import read_adapter
from deltaserve_store.parsed import LoraDelta, ParsedAdapter
from deltatest.peft_adapters import make_bitfit, make_peft_ia3, make_peft_ln_tuning, make_peft_lora, make_sparse
from deltatest.probe_engine import SerialEngine
from deltatest.tiny_models import build_tiny_model

torch.set_num_threads(1)
VERSION = "ab" * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def bases(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, BaseModel]:
    cache = tmp_path_factory.mktemp("digests")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return {dtype: load_base(folder, dtype=dtype, cache_dir=cache) for dtype in dtypes}


@pytest.fixture(scope="module")
def adapters(folder: Path, bases: dict[torch.dtype, BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    root = tmp_path_factory.mktemp("adapters")
    make_peft_lora(model, root / "lora", rank_pattern={"q_proj": 3}, use_rslora=True)
    make_peft_lora(model, root / "zero", std=0.0)
    make_sparse(bases[torch.float32].spec, root / "sparse")
    make_peft_lora(model, root / "dora", use_dora=True)
    make_peft_ia3(model, root / "ia3", std=0.1)
    make_peft_ln_tuning(model, root / "norms", std=0.1)
    make_bitfit(bases[torch.float32].spec, root / "bitfit")
    return root


def measure(
    base: BaseModel,
    adapter: ParsedAdapter,
    folded: FoldedAdapter,
    tmp_path: Path,
    on_probe: Callable[[Binding, torch.Tensor], torch.Tensor] | None = None,
) -> Evidence:
    async def in_worker(function: Callable[[], torch.Tensor]) -> torch.Tensor:
        return await asyncio.to_thread(function)

    folded.save(tmp_path / "folded")
    engine = SerialEngine(base)
    engine.on_probe = on_probe
    engine.register_candidate(VERSION, tmp_path / "folded")
    key = ProofKey(base.spec.fingerprint, str(base.dtype), "cpu", "test", 1)
    return asyncio.run(Prover(base, engine, key, in_worker).measure(VERSION, adapter))


@pytest.mark.parametrize("kind", ["lora", "sparse", "dora", "ia3", "norms", "bitfit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_applied_right_passes(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    base = bases[dtype]
    adapter = read_adapter(adapters / kind, base.spec)
    evidence = measure(base, adapter, fold(adapter, base.spec, dtype, base), tmp_path)
    assert judge(evidence, accept_no_effect=False).reasons == ()
    assert evidence.num_tokens == MAX_PROBE_TOKENS
    assert evidence.effect > 10 * evidence.tolerance if dtype == torch.float32 else evidence.effect > 0
    assert (evidence.base_error is None) == (dtype == torch.float32)
    assert Evidence.from_dict(evidence.to_dict()) == evidence
    assert Evidence.from_dict({**evidence.to_dict(), "plain": {}}) is None
    assert Evidence.from_dict({"effect": 1.0}) is None


def test_logits_are_looked_at_in_the_worker_alone(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large vocabulary that takes a second, in which the event loop would answer nobody."""
    threads: set[int] = set()
    for name in ("_distance", "_rms", "_finite", "_rows"):
        original = getattr(proof, name)

        def spy(*args: Any, original: Callable[..., Any] = original) -> Any:
            threads.add(threading.get_ident())
            return original(*args)

        monkeypatch.setattr(proof, name, spy)
    base = bases[torch.bfloat16]
    adapter = read_adapter(adapters / "lora", base.spec)
    assert measure(base, adapter, fold(adapter, base.spec, base.dtype), tmp_path).is_within_tolerance
    assert threads
    assert threading.get_ident() not in threads


def scaled(adapter: ParsedAdapter, module: str, factor: float) -> ParsedAdapter:
    """The same adapter with another scaling on one of its linears."""
    deltas = tuple(
        replace(delta, scaling=delta.scaling * factor)
        if isinstance(delta, LoraDelta) and delta.module == module
        else delta
        for delta in adapter.deltas
    )
    return replace(adapter, deltas=deltas)


def without(folded: FoldedAdapter, linear: str) -> FoldedAdapter:
    return replace(folded, terms={name: terms for name, terms in folded.terms.items() if name != linear})


def swapped(folded: FoldedAdapter, one: str, other: str) -> FoldedAdapter:
    terms = dict(folded.terms)
    terms[one], terms[other] = terms[other], terms[one]
    return replace(folded, terms=terms)


def transposed_rank(folded: FoldedAdapter, linear: str) -> FoldedAdapter:
    """Rank rows of B in another order than those of A."""
    (term,) = folded.terms[linear]
    assert isinstance(term, LowRankTerm)
    return replace(folded, terms={**folded.terms, linear: (replace(term, b_t=term.b_t.roll(1, 0).contiguous()),)})


LAST = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "fault",
    [
        lambda folded, adapter, spec: fold(scaled(adapter, LAST, 1.01), spec, torch.float32),
        lambda folded, adapter, spec: without(folded, LAST),
        lambda folded, adapter, spec: swapped(folded, LAST, "model.layers.0.self_attn.q_proj"),
        lambda folded, adapter, spec: transposed_rank(folded, LAST),
    ],
    ids=["scaling off by 1 %", "one linear missing", "layers swapped", "ranks shifted"],
)
def test_what_is_applied_wrong_is_refused(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path, fault: Callable[..., FoldedAdapter]
) -> None:
    base = bases[torch.float32]
    adapter = read_adapter(adapters / "lora", base.spec)
    wrong = fault(fold(adapter, base.spec, torch.float32), adapter, base.spec)
    evidence = measure(base, adapter, wrong, tmp_path)
    (reason,) = judge(evidence, accept_no_effect=True).reasons
    assert reason.code == "proof_failed"
    assert evidence.max_error > 2 * evidence.tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_not_applied_at_all_is_refused_in_narrow_dtypes(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = bases[dtype]
    adapter = read_adapter(adapters / "lora", base.spec)
    nothing = fold(read_adapter(adapters / "zero", base.spec), base.spec, dtype)
    evidence = measure(base, adapter, nothing, tmp_path)
    assert [reason.code for reason in judge(evidence, accept_no_effect=True).reasons] == ["proof_failed"]


def off_by_a_percent(folded: FoldedAdapter) -> FoldedAdapter:
    """One vector of one linear or norm, whichever there is."""
    if folded.norms:
        name, norm = next(iter(folded.norms.items()))
        return replace(folded, norms={**folded.norms, name: replace(norm, gain=norm.gain + 0.01)})
    name, terms = next((n, t) for n, t in folded.terms.items() if isinstance(t[-1], VectorTerm))
    changed = VectorTerm(
        *(None if t is None else t + 0.01 for t in (terms[-1].scale, terms[-1].bias, terms[-1].in_scale))
    )
    return replace(folded, terms={**folded.terms, name: (*terms[:-1], changed)})


def without_a_vector(folded: FoldedAdapter) -> FoldedAdapter:
    if folded.norms:
        return replace(folded, norms=dict(list(folded.norms.items())[1:]))
    name, terms = next((n, t) for n, t in reversed(folded.terms.items()) if isinstance(t[-1], VectorTerm))
    return replace(folded, terms={**folded.terms, name: terms[:-1]})


@pytest.mark.parametrize("fault", [off_by_a_percent, without_a_vector])
@pytest.mark.parametrize("kind", ["dora", "ia3", "norms", "bitfit"])
def test_vectors_applied_wrong_are_refused(
    bases: dict[torch.dtype, BaseModel],
    adapters: Path,
    tmp_path: Path,
    kind: str,
    fault: Callable[[FoldedAdapter], FoldedAdapter],
) -> None:
    base = bases[torch.float32]
    adapter = read_adapter(adapters / kind, base.spec)
    wrong = fault(fold(adapter, base.spec, torch.float32, base))
    evidence = measure(base, adapter, wrong, tmp_path)
    assert [reason.code for reason in judge(evidence, accept_no_effect=True).reasons] == ["proof_failed"]


def test_no_effect_is_refused_unless_waived(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path
) -> None:
    base = bases[torch.float32]
    adapter = read_adapter(adapters / "zero", base.spec)
    evidence = measure(base, adapter, fold(adapter, base.spec, torch.float32), tmp_path)
    assert evidence.effect == 0.0
    assert [reason.code for reason in judge(evidence, accept_no_effect=False).reasons] == ["no_effect"]
    waived = judge(evidence, accept_no_effect=True)
    assert (waived.reasons, waived.waivers) == ((), ("no_effect",))
    assert len(waived.warnings) == 1


def faint(adapter: ParsedAdapter, factor: float) -> ParsedAdapter:
    deltas = tuple(replace(d, scaling=d.scaling * factor) for d in adapter.deltas if isinstance(d, LoraDelta))
    return replace(adapter, deltas=deltas)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
def test_a_faint_adapter_is_proven_at_a_larger_scale(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path, dtype: torch.dtype, factor: float
) -> None:
    base = bases[dtype]
    adapter = faint(read_adapter(adapters / "lora", base.spec), factor)
    evidence = measure(base, adapter, fold(adapter, base.spec, dtype), tmp_path)
    assert 0 < evidence.effect <= evidence.tolerance
    assert evidence.amplified is not None
    assert evidence.amplified.effect > 1.5 * evidence.amplified.tolerance
    judgement = judge(evidence, accept_no_effect=False)
    assert judgement.reasons == ()
    assert "below the noise" in judgement.warnings[0]
    assert Evidence.from_dict(evidence.to_dict()) == evidence


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
def test_a_faint_adapter_not_applied_at_all_is_refused(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path, dtype: torch.dtype, factor: float
) -> None:
    """At scale 1 the fault is smaller than what rounding may do."""
    base = bases[dtype]
    adapter = faint(read_adapter(adapters / "lora", base.spec), factor)
    nothing = fold(read_adapter(adapters / "zero", base.spec), base.spec, dtype)
    evidence = measure(base, adapter, nothing, tmp_path)
    assert evidence.plain.is_within_tolerance
    (reason,) = judge(evidence, accept_no_effect=True).reasons
    assert reason.code == "proof_failed"
    assert "at scale" in reason.found


def test_a_clear_effect_needs_one_comparison(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path
) -> None:
    base = bases[torch.float32]
    adapter = read_adapter(adapters / "lora", base.spec)
    assert measure(base, adapter, fold(adapter, base.spec, torch.float32), tmp_path).amplified is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_answers_are_refused(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path, value: float
) -> None:
    base = bases[torch.float32]
    adapter = read_adapter(adapters / "lora", base.spec)

    def poison(binding: Binding, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        if not binding.is_base:
            logits[3, 5] = value
        return logits

    with pytest.raises(NonFiniteOutput, match="engine"):
        measure(base, adapter, fold(adapter, base.spec, torch.float32), tmp_path, on_probe=poison)


def test_terms_that_overflow_inside_the_model_are_refused(
    bases: dict[torch.dtype, BaseModel], adapters: Path, tmp_path: Path
) -> None:
    """Finite files, finite float16 terms, and yet infinity in a product: only running it shows that."""
    base = bases[torch.float16]
    adapter = scaled(read_adapter(adapters / "lora", base.spec), "model.layers.0.mlp.down_proj", 4e4)
    with pytest.raises(NonFiniteOutput, match="engine"):
        measure(base, adapter, fold(adapter, base.spec, torch.float16), tmp_path)


def test_probe_tokens_come_from_the_digest_and_fit_the_base(bases: dict[torch.dtype, BaseModel]) -> None:
    spec = bases[torch.float32].spec
    ids = probe_ids(VERSION, spec, 512)
    assert ids == probe_ids(VERSION, spec, 512)
    assert ids != probe_ids("cd" * 32, spec, 512)
    assert len(set(ids)) > 32
    assert len(probe_ids(VERSION, spec, 20)) == 19
    assert max(probe_ids(VERSION, replace(spec, num_tokens=7), 512)) < 7
