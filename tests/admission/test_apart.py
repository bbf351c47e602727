"""Residual modules and whole-weight differences through the door: proven as they are, refused when applied wrong, and
answered, evicted and loaded again by the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.admission.evidence import Evidence, ProofKey
from deltaserve.admission.proof import Prover, judge
from deltaserve.deltas.dense import DenseTerm
from deltaserve.deltas.fold import fold
from deltaserve.deltas.folded import FoldedAdapter, FoldedFileInvalid, Term
from deltaserve.deltas.modules import ModuleTerm
from deltaserve.errors import AdapterRefused
from deltaserve.model.base import BaseModel
from deltaserve_kernels import use_backend
from deltaserve_store.bottleneck_deltas import BottleneckDelta
from deltaserve_store.dense_deltas import DenseDelta, SignDelta
from deltaserve_store.formats import read_adapter
from deltaserve_store.formats.deltaserve_vectors import write_vector_adapter
from deltaserve_store.parsed import ParsedAdapter
from deltaserve_store.vector_deltas import VectorDelta
from deltatest.admission_rig import Rig, run
from deltatest.apart_adapters import make_bottleneck, make_dense
from deltatest.engine_fakes import request as make_request
from deltatest.probe_engine import SerialEngine
from deltatest.real_engine import fold_folder, real_rig

VERSION = "ab" * 32
KINDS = ("bottleneck", "delta", "mask", "thick-mask", "signs")


@pytest.fixture(scope="module")
def folders(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("apart")
    made = {"bottleneck": make_bottleneck(base.spec, root / "bottleneck", parallel=True)}
    return made | {kind: make_dense(base.spec, root / kind, kind) for kind in KINDS[1:]}


def measure(base: BaseModel, adapter: ParsedAdapter, folded: FoldedAdapter, path: Path) -> Evidence:
    async def in_worker(function: Callable[[], Any]) -> Any:
        return function()

    folded.save(path)
    engine = SerialEngine(base)
    engine.register_candidate(VERSION, path)
    key = ProofKey(base.spec.fingerprint, str(base.dtype), "cpu", "test", 1)
    return asyncio.run(Prover(base, engine, key, in_worker).measure(VERSION, adapter))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_applied_right_passes_in_narrow_dtypes(
    load: Callable[[torch.dtype], BaseModel], folders: dict[str, Path], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    base = load(dtype)
    adapter = read_adapter(folders[kind], base.spec)
    evidence = measure(base, adapter, fold(adapter, base.spec, dtype, base), tmp_path / "f")
    assert judge(evidence, accept_no_effect=False).reasons == ()
    assert evidence.effect > 2 * evidence.tolerance


def with_module(folded: FoldedAdapter, point: str, change: Callable[[ModuleTerm], ModuleTerm]) -> FoldedAdapter:
    return replace(folded, modules={**folded.modules, point: change(folded.modules[point])})


@pytest.mark.parametrize(
    "fault",
    [
        lambda f: with_module(f, "layers.1.mlp_out", lambda m: replace(m, up_t=m.up_t * 1.01)),
        lambda f: with_module(f, "layers.0.attn_out", lambda m: replace(m, is_parallel=not m.is_parallel)),
        lambda f: with_module(f, "layers.0.mlp_in", lambda m: replace(m, activation="identity")),
        lambda f: with_module(f, "layers.0.mlp_out", lambda m: replace(m, down_bias=None, up_bias=None)),
        lambda f: replace(f, modules={name: m for name, m in f.modules.items() if name != "final_hidden"}),
        lambda f: replace(f, modules={**f.modules, "layers.0.mlp_out": f.modules["layers.1.mlp_out"]}),
    ],
    ids=["off by 1 %", "other placement", "other activation", "biases lost", "one lost", "layers confused"],
)
def test_modules_applied_wrong_are_refused(
    base: BaseModel, folders: dict[str, Path], tmp_path: Path, fault: Callable[[FoldedAdapter], FoldedAdapter]
) -> None:
    adapter = read_adapter(folders["bottleneck"], base.spec)
    evidence = measure(base, adapter, fault(fold(adapter, base.spec, torch.float32, base)), tmp_path / "f")
    assert [reason.code for reason in judge(evidence, accept_no_effect=True).reasons] == ["proof_failed"]


@pytest.mark.parametrize("kind", ["delta", "thick-mask", "signs"])
def test_differences_applied_wrong_are_refused(
    base: BaseModel, folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    def spoilt(term: Term) -> Term:
        if not isinstance(term, DenseTerm):
            return term
        if term.delta is not None:
            return replace(term, delta=term.delta.flip(0).contiguous())
        if term.mask is not None:
            return replace(term, mask=term.mask.flip(0).contiguous())
        return replace(term, signs=None if term.signs is None else ~term.signs)

    adapter = read_adapter(folders[kind], base.spec)
    folded = fold(adapter, base.spec, torch.float32, base)
    last = [name for name, terms in folded.terms.items() if any(isinstance(term, DenseTerm) for term in terms)][-1]
    wrong = replace(folded, terms={**folded.terms, last: tuple(map(spoilt, folded.terms[last]))})
    evidence = measure(base, adapter, wrong, tmp_path / "f")
    assert [reason.code for reason in judge(evidence, accept_no_effect=True).reasons] == ["proof_failed"]


def test_a_faint_module_is_proven_at_a_larger_scale(base: BaseModel, tmp_path: Path) -> None:
    adapter = read_adapter(make_bottleneck(base.spec, tmp_path / "a", ("mlp_out",), scale=1e-6), base.spec)
    folded = fold(adapter, base.spec, torch.float32, base)
    evidence = measure(base, adapter, folded, tmp_path / "f")
    assert evidence.amplified is not None
    assert judge(evidence, accept_no_effect=False).reasons == ()
    nothing = measure(base, adapter, replace(folded, modules={}), tmp_path / "g")
    assert [reason.code for reason in judge(nothing, accept_no_effect=True).reasons] == ["proof_failed"]


def folded_with(base: BaseModel, *deltas: Any) -> FoldedAdapter:
    parsed = ParsedAdapter("dense", "deltaserve-dense", deltas, {}, None, None, None, 1)
    return fold(parsed, base.spec, base.dtype, base)


def test_what_does_not_fit_is_not_folded(base: BaseModel) -> None:
    name, linear = next(iter(base.spec.linears.items()))
    size = linear.out_features, linear.in_features
    module = BottleneckDelta("layers.0.attn_out", torch.zeros(2, 64), torch.zeros(64, 2), "relu")
    good = DenseDelta(name, torch.zeros(size))
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("shape_mismatch", (DenseDelta(name, torch.zeros(3, 4)),)),
        ("shape_mismatch", (SignDelta(name, torch.zeros(size[0], 9, dtype=torch.int32), torch.ones(1)),)),
        ("shape_mismatch", (SignDelta(name, torch.zeros(size[0], 2, dtype=torch.int32), torch.ones(7)),)),
        ("duplicate_module", (good, good)),
        ("unknown_module", (DenseDelta("a.b", torch.zeros(size)),)),
        ("unknown_module", (replace(module, point="layers.9.attn_out"),)),
        ("duplicate_module", (module, module)),
        ("shape_mismatch", (replace(module, up=torch.zeros(2, 64)),)),
        ("value_out_of_range", (replace(module, up=torch.full((64, 2), 6e4), scale=float("1e38")),)),
    ]
    for code, deltas in wrong:
        with pytest.raises(AdapterRefused) as caught:
            folded_with(base, *deltas)
        assert [reason.code for reason in caught.value.reasons] == [code], deltas


@pytest.mark.parametrize(
    "change",
    [
        lambda f: with_module(f, "layers.0.attn_out", lambda m: replace(m, up_t=m.up_t[:, :5].contiguous())),
        lambda f: with_module(f, "layers.0.attn_out", lambda m: replace(m, activation="mish")),
        lambda f: with_module(f, "layers.0.attn_in", lambda m: replace(m, down=m.down.half())),
        lambda f: with_module(f, "layers.0.attn_in", lambda m: replace(m, up_bias=torch.zeros(3))),
        lambda f: replace(f, modules={"layers.7.mlp_out": f.modules["layers.0.mlp_out"]}),
        lambda f: replace(f, terms={"model.layers.0.mlp.up_proj": (DenseTerm(64, torch.zeros(3, 3)),)}),
        lambda f: replace(f, terms={"model.layers.0.mlp.up_proj": (DenseTerm(64, scale=torch.zeros(96)),)}),
        lambda f: replace(f, terms={"layers.0.mlp_in": (DenseTerm(64, torch.zeros(64, 64)),)}),
    ],
)
def test_folded_files_that_do_not_fit_the_base_do_not_load(
    base: BaseModel, folders: dict[str, Path], tmp_path: Path, change: Callable[[FoldedAdapter], FoldedAdapter]
) -> None:
    change(fold_folder(folders["bottleneck"], base)).save(tmp_path / "f")
    with pytest.raises(FoldedFileInvalid):
        FoldedAdapter.load(tmp_path / "f", base.spec, base.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_is_committed_and_comes_back_as_it_was(
    rig: Rig, folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    result = run(rig.admit(folders[kind], "poet"))
    assert result.created
    assert result.evidence.effect > 0.1 > result.evidence.tolerance
    path = rig.proven.locate(result.record.version)
    assert path is not None
    read, made = FoldedAdapter.load(path, rig.base.spec, torch.float32), fold_folder(folders[kind], rig.base)
    assert (read.kinds, read.nbytes) == (made.kinds, made.nbytes)
    assert made.kinds == {"bottleneck": ("bottleneck",), "delta": ("dense", "vector"), "mask": ("sparse",)}.get(
        kind, ("dense",)
    )
    pairs = [(one, other) for name in made.terms for one, other in zip(made.terms[name], read.terms[name], strict=True)]
    pairs += [(made.modules[point], read.modules[point]) for point in made.modules]  # type: ignore[misc]
    for one, other in pairs:
        assert type(one) is type(other)
        for field in one.__slots__:
            before, after = getattr(one, field), getattr(other, field)
            assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    assert rig.is_clean()


def test_gates_of_both_sides_and_offsets_of_heads_pass_the_door(rig: Rig, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = []
    for name, linear in rig.base.spec.linears.items():
        gates = [(torch.rand(n, generator=generator) < 0.9).float() for n in (linear.out_features, linear.in_features)]
        offset = torch.randn(linear.in_features, generator=generator) if name.endswith("o_proj") else None
        deltas.append(VectorDelta(name, *gates, in_bias=offset))
    write_vector_adapter(tmp_path / "gates", deltas, rig.base.spec.fingerprint)
    result = run(rig.admit(tmp_path / "gates", "gates"))
    assert result.evidence.effect > 0.1 > result.evidence.tolerance
    faint = [VectorDelta(d.module, 1 - 1e-6 * (1 - d.out_scale), 1 - 1e-6 * (1 - d.in_scale)) for d in deltas]
    write_vector_adapter(tmp_path / "faint", faint, rig.base.spec.fingerprint)
    assert run(rig.admit(tmp_path / "faint", "faint")).evidence.amplified is not None


def test_steps_with_such_rows_are_not_replayed_as_graphs(base: BaseModel, folders: dict[str, Path]) -> None:
    adapters = {kind: fold_folder(folders[kind], base) for kind in ("bottleneck", "signs")}
    prompts = {"base": list(range(5, 15)), "bottleneck": list(range(7, 16)), "signs": list(range(9, 20))}

    def answers(*, has_graphs: bool) -> Any:
        rig = real_rig(base, adapters, num_blocks=16, max_num_seqs=4, has_graphs=has_graphs)
        asked = (
            make_request(name, ids, *([name] if name in adapters else []), max_tokens=4, ignore_eos=True)
            for name, ids in prompts.items()
        )
        return rig.run(*asked)

    before = use_backend("reference")
    try:
        assert answers(has_graphs=True) == answers(has_graphs=False)
    finally:
        use_backend(before)


def test_the_engine_answers_evicts_and_loads_again(base: BaseModel, folders: dict[str, Path]) -> None:
    """Two slots for five adapters: each is loaded, evicted and loaded again, and says the same to the token."""
    adapters = {kind: fold_folder(folder, base) for kind, folder in folders.items()}
    prompt = list(range(5, 25))

    def ask(name: str, turn: int) -> Any:
        return make_request(f"{name}{turn}", prompt, *([name] if name != "base" else []), max_tokens=6, ignore_eos=True)

    names = ("base", *KINDS)
    roomy = real_rig(base, adapters).run(*(ask(name, 0) for name in names))
    tight = real_rig(base, adapters, num_slots=2)
    for turn in (1, 2):
        found = tight.run(*(ask(name, turn) for name in names))
        assert {name: found[f"{name}{turn}"] for name in names} == {name: roomy[f"{name}0"] for name in names}
    assert tight.max_distinct_adapters == 2
    assert len({tuple(roomy[f"{name}0"][0]) for name in names}) >= 4
