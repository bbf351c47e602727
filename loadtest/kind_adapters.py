"""One adapter of every kind, in the size that its method is usually given: random numbers in the form that is served.

What a step costs depends on shapes and memory, not on values; all are small enough that logits stay finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from deltaserve.deltas.blocks import BlockTerm
from deltaserve.deltas.dense import DenseTerm
from deltaserve.deltas.folded import FoldedAdapter, LowRankTerm, SparseTerm, Term
from deltaserve.deltas.modules import ModuleTerm
from deltaserve.deltas.prefixes import PrefixTerm
from deltaserve.deltas.rotation_terms import RotationTerm, Side
from deltaserve.deltas.vector_terms import NormTerm, VectorTerm
from deltaserve.deltas.vocabulary import RowsTerm
from deltaserve.model.base import BaseModel
from deltaserve_kernels import BLOCK_SIZE, RotationEntry, RotationFactor, pack_bits
from deltaserve_store.spec import LinearSpec

RANK, DENSITY, MASKED, MARKED, PREFIX_TOKENS, TOKENS, BLOCK, BOTTLENECK = 16, 0.005, 0.05, 0.1, 32, 64, 32, 64
NO_TERMS: Mapping[str, tuple[Term, ...]] = MappingProxyType({})
FIRST_TOKEN = 5
"""Tokens from here on are trained by the kind of trained tokens, and decoded by the benchmark."""


@dataclass(frozen=True, slots=True)
class Kind:
    """``make`` gives one adapter. ``on``: the kind whose step is the reference, "" for the base alone.

    ``is_vector``: has vectors and nothing else beyond its reference.
    """

    name: str
    title: str
    make: Callable[[BaseModel], FoldedAdapter]
    on: str = ""
    is_vector: bool = False


def last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _folded(base: BaseModel, terms: Mapping[str, tuple[Term, ...]] = NO_TERMS) -> FoldedAdapter:
    return FoldedAdapter(terms, base.spec.fingerprint, base.dtype)


def _linears(base: BaseModel, *only: str) -> Iterator[tuple[str, LinearSpec]]:
    """All linears in order of calls, or those with one of these last names."""
    for name in base.linears:
        if not only or last(name) in only:
            yield name, base.spec.linears[name]


def _normal(base: BaseModel, *shape: int, std: float) -> Tensor:
    return (torch.randn(shape) * std).to(base.dtype)


def _near_one(size: int) -> Tensor:
    return 1 + 0.05 * torch.randn(size)


def low_rank(base: BaseModel, *, has_scale: bool = False) -> FoldedAdapter:
    """LoRA on all linears; with a scale of each output it is DoRA."""
    terms: dict[str, tuple[Term, ...]] = {}
    for name, spec in _linears(base):
        a = _normal(base, RANK, spec.in_features, std=spec.in_features**-0.5)
        b_t = _normal(base, RANK, spec.out_features, std=0.2 * RANK**-0.5)
        scale = (VectorTerm(scale=_near_one(spec.out_features)),) if has_scale else ()
        terms[name] = (LowRankTerm(a, b_t), *scale)
    return _folded(base, terms)


def sparse(base: BaseModel, density: float) -> FoldedAdapter:
    """Entries at random places of all linears, as many in each row."""
    terms: dict[str, tuple[Term, ...]] = {}
    for name, spec in _linears(base):
        count = max(1, round(density * spec.in_features))
        chosen = torch.rand(spec.out_features, spec.in_features).topk(count, dim=1).indices.sort(dim=1).values
        indptr = torch.arange(0, spec.out_features * count + 1, count, dtype=torch.int32)
        values = _normal(base, spec.out_features * count, std=0.02)
        terms[name] = (SparseTerm(indptr, chosen.flatten().int(), values),)
    return _folded(base, terms)


def vectors(base: BaseModel, make: Callable[[LinearSpec], VectorTerm], *only: str) -> FoldedAdapter:
    return _folded(base, {name: (make(spec).narrowed(),) for name, spec in _linears(base, *only)})


def ia3(base: BaseModel) -> FoldedAdapter:
    """Scales of k and v, and of what down is fed."""
    outputs = vectors(base, _out_scale, "k_proj", "v_proj")
    inputs = vectors(base, lambda spec: VectorTerm(in_scale=_near_one(spec.in_features)), "down_proj")
    return _folded(base, {**outputs.terms, **inputs.terms})


def _out_scale(spec: LinearSpec) -> VectorTerm:
    return VectorTerm(scale=_near_one(spec.out_features))


def _bias(spec: LinearSpec) -> VectorTerm:
    return VectorTerm(bias=0.05 * torch.randn(spec.out_features))


def _gates(spec: LinearSpec) -> VectorTerm:
    outputs, inputs = ((torch.rand(size) < 0.9).float() for size in (spec.out_features, spec.in_features))
    return VectorTerm(scale=outputs, in_scale=inputs)


def _both_sides(spec: LinearSpec) -> VectorTerm:
    return VectorTerm(scale=_near_one(spec.out_features), in_scale=_near_one(spec.in_features))


def norms(base: BaseModel) -> FoldedAdapter:
    changed = {name: NormTerm(gain=0.05 * torch.randn(len(base.norm(name)[0]))) for name in base.norms}
    return replace(_folded(base), norms=changed)


def rotations(base: BaseModel, side: Side, turn: Callable[[int], RotationEntry]) -> FoldedAdapter:
    return _folded(
        base,
        {
            name: (RotationTerm(side, turn(spec.in_features if side == "input" else spec.out_features)),)
            for name, spec in _linears(base)
        },
    )


def _blocks(base: BaseModel, count: int, size: int) -> Tensor:
    return _normal(base, count, size, size, std=0.05 * size**-0.5)


def oft(base: BaseModel) -> FoldedAdapter:
    return rotations(base, "input", lambda width: (RotationFactor(_blocks(base, width // BLOCK, BLOCK)),))


def boft(base: BaseModel) -> FoldedAdapter:
    """Two factors of blocks of 8, the second in another order, and the scale of outputs that the method trains."""

    def turn(width: int) -> RotationEntry:
        order = torch.arange(width, dtype=torch.int32).view(2, -1).t().flatten().contiguous()
        return RotationFactor(_blocks(base, width // 8, 8)), RotationFactor(_blocks(base, width // 8, 8), order)

    turned = rotations(base, "input", turn)
    scaled = vectors(base, _out_scale)
    return _folded(base, {name: (*turned.terms[name], *scaled.terms[name]) for name in turned.terms})


def road(base: BaseModel) -> FoldedAdapter:
    return rotations(base, "output", lambda width: (RotationFactor(_blocks(base, width // 2, 2)),))


def prefix(base: BaseModel) -> FoldedAdapter:
    spec, blocks = base.spec, -(-PREFIX_TOKENS // BLOCK_SIZE)
    pages = _normal(
        base, base.num_kv_regimes, blocks, spec.num_layers, 2, spec.kv_heads, BLOCK_SIZE, spec.head_dim, std=0.5
    )
    return replace(_folded(base), prefix=PrefixTerm(pages, PREFIX_TOKENS))


def tokens(base: BaseModel) -> FoldedAdapter:
    """New rows of some tokens, of the embedding and, with it where they are tied, of the head."""
    count = min(TOKENS, base.vocab_size - FIRST_TOKEN)
    ids = torch.arange(FIRST_TOKEN, FIRST_TOKEN + count, dtype=torch.int32)
    values = _normal(base, count, base.hidden_size, std=0.02)
    return _folded(base, {name: (RowsTerm(ids, values.clone()),) for name in base.matrices if name is not None})


def blocks(base: BaseModel) -> FoldedAdapter:
    """S2FT: columns of o and down."""
    terms: dict[str, tuple[Term, ...]] = {}
    for name, spec in _linears(base, "o_proj", "down_proj"):
        columns = torch.randperm(spec.in_features)[: max(1, spec.in_features // 20)].sort().values.int()
        d = _normal(base, len(columns), spec.out_features, std=0.02)
        terms[name] = (BlockTerm(d, None, columns, spec.in_features, spec.out_features),)
    return _folded(base, terms)


def dense(base: BaseModel, layers: int = 2) -> FoldedAdapter:
    """Whole differences of all linears of the middle layers."""
    first = max(0, base.spec.num_layers // 2 - layers // 2)
    chosen = [(name, spec) for name, spec in _linears(base) if spec.layer in range(first, first + layers)]
    made = {
        n: DenseTerm(s.in_features, delta=_normal(base, s.out_features, s.in_features, std=0.01)) for n, s in chosen
    }
    return _folded(base, {name: (term,) for name, term in made.items()})


def signs(base: BaseModel) -> FoldedAdapter:
    """BitDelta: a sign for each weight of all linears, and a scale."""
    terms: dict[str, tuple[Term, ...]] = {}
    for name, spec in _linears(base):
        words = torch.randint(-(2**31), 2**31, (spec.out_features, -(-spec.in_features // 32)), dtype=torch.int64)
        scale = torch.full((spec.out_features,), 0.002)
        terms[name] = (DenseTerm(spec.in_features, signs=words.int(), scale=scale),)
    return _folded(base, terms)


def bitmap(base: BaseModel) -> FoldedAdapter:
    """Mask fine-tuning where so many weights are taken out that their mask is kept."""
    terms: dict[str, tuple[Term, ...]] = {}
    for name, spec in _linears(base):
        mask = pack_bits(torch.rand(spec.out_features, spec.in_features) < MARKED)
        terms[name] = (DenseTerm(spec.in_features, mask=mask),)
    return _folded(base, terms)


def bottlenecks(base: BaseModel, endings: Iterable[str], *, is_parallel: bool = False) -> FoldedAdapter:
    modules: dict[str, ModuleTerm] = {}
    for point in base.points:
        if point.endswith(tuple(endings)):
            down, up_t = (_normal(base, BOTTLENECK, base.hidden_size, std=0.02) for _ in range(2))
            down_bias, up_bias = 0.01 * torch.randn(BOTTLENECK), 0.01 * torch.randn(base.hidden_size)
            modules[point] = ModuleTerm(down, up_t, "gelu", down_bias, up_bias, is_parallel)
    return replace(_folded(base), modules=modules)


KINDS = (
    Kind("lora", f"LoRA, rank {RANK}", low_rank),
    Kind("sparse", f"sparse, {100 * DENSITY:g} %", lambda base: sparse(base, DENSITY)),
    Kind("ia3", "IA3: scales of k, v and down's input", ia3, is_vector=True),
    Kind("dora", "DoRA: scales on top of LoRA", lambda base: low_rank(base, has_scale=True), "lora", is_vector=True),
    Kind("bias", "BitFit: biases of all linears", lambda base: vectors(base, _bias), is_vector=True),
    Kind("beft", "BEFT: biases of v", lambda base: vectors(base, _bias, "v_proj"), is_vector=True),
    Kind("norms", "LN tuning: gains of all norms", norms, is_vector=True),
    Kind("lofit", "LoFiT: offsets of heads", lambda base: vectors(base, _bias, "o_proj"), is_vector=True),
    Kind("gates", "FineGates: gates of all outputs and inputs", lambda base: vectors(base, _gates), is_vector=True),
    Kind("scales", "scales of all outputs and inputs", lambda base: vectors(base, _both_sides), is_vector=True),
    Kind("oft", f"OFT, blocks of {BLOCK}", oft),
    Kind("boft", "BOFT, 2 factors of blocks of 8", boft),
    Kind("road", "RoAd, pairs of outputs", road),
    Kind("prefix", f"prefix of {PREFIX_TOKENS} positions", prefix),
    Kind("tokens", f"{TOKENS} trained tokens, embedding and head", tokens),
    Kind("blocks", "S2FT: 5 % of the columns of o and down", blocks),
    Kind("dense", "whole differences of 2 layers", dense),
    Kind("mask", f"mask of {100 * MASKED:g} % of all linears", lambda base: sparse(base, MASKED)),
    Kind("bitmap", f"mask of {100 * MARKED:g} % of all linears, as bits", bitmap),
    Kind("signs", "BitDelta: signs of all linears", signs),
    Kind("houlsby", f"Houlsby modules of {BOTTLENECK}", lambda base: bottlenecks(base, ("attn_out", "mlp_out"))),
    Kind(
        "parallel", f"parallel modules of {BOTTLENECK}", lambda base: bottlenecks(base, ("mlp_out",), is_parallel=True)
    ),
)
BY_NAME = {kind.name: kind for kind in KINDS}
