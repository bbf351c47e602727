"""Damaged adapters of the converted PEFT types, for the base of ``adapter_corpus``. No case needs PEFT.

A good file is filled from the reader's own list of tensors (that this is PEFT's list, the parity tests show). Every
type gets the same damage to every one of its tensors, and what can only go wrong with that type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deltaserve_store.formats.peft_kinds.reader import TensorRule
from deltaserve_store.formats.peft_kinds.table import READERS
from deltatest.adapter_corpus import (
    CONFIG,
    PREFIX,
    TENSORS,
    BadAdapter,
    corpus_base,
    edit_config,
    edit_tensors,
    set_value,
)

V0 = "model.layers.0.self_attn.v_proj"
V0_TENSOR = f"{PREFIX}{V0}"
TARGETED = ("q_proj", "v_proj")

CONFIGS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 3, "r": 8, "lora_alpha": 6, "rank_pattern": {f"{V0}.lora_E": [True, False, True]}},
    "vera": {"r": 4, "projection_prng_key": 3, "save_projection": True},
    "loha": {"r": 2, "alpha": 4},
    "lokr": {"r": 1, "alpha": 4},
    "miss": {"r": 4},
    "gralora": {"r": 4, "alpha": 8, "gralora_k": 2, "hybrid_r": 1},
    "delora": {"r": 3},
    "vblora": {"r": 2, "num_vectors": 6, "vector_length": 4, "topk": 2},
    "unilora": {"r": 2, "theta_d_length": 40, "save_indices": True},
    "tinylora": {"r": 2, "u": 3, "weight_tying": 1.0},
    "hra": {"r": 2, "apply_GS": False},
    "supertuning": {"sparsity": 0.9},
    "fourierft": {"n_frequency": 3},
    "waveft": {"n_frequency": 5},
    "c3a": {"block_size": 8},
    "randlora": {"r": 3, "randlora_alpha": 6},
    "hira": {"r": 2},
    "deft": {"r": 2, "decomposition_method": "qr"},
    "oft": {
        "r": 0,
        "oft_block_size": 4,
        "coft": False,
        "eps": 6e-5,
        "block_share": False,
        "use_cayley_neumann": False,
        "num_cayley_neumann_terms": 5,
    },
    "road": {"variant": "road_1", "group_size": 4},
    "boft": {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 2},
    "beft": {},
    "pvera": {"r": 4, "projection_prng_key": 3, "save_projection": True},
    "psoft": {
        "r": 3,
        "psoft_orth": True,
        "psoft_mag_a": True,
        "psoft_mag_b": True,
        "ab_svd_init": "psoft_init",
        "use_cayley_neumann": False,
        "num_cayley_neumann_terms": 5,
    },
    "glora": {"r": 2, "config_A_B": "lora", "config_C": "none", "config_D_E": "none"},
    "frod": {"sparse_rate": 0.05},
}


def write_good_kind(folder: Path, kind: str) -> Path:
    """An adapter of ``kind`` on ``q_proj`` and ``v_proj`` of both layers, with random values."""
    folder.mkdir(parents=True, exist_ok=True)
    reader_type = READERS[kind.upper()]
    config = {
        "peft_type": kind.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tests/corpus-base",
        "target_modules": list(TARGETED),
        **CONFIGS[kind],
    }
    linears = tuple(linear for name, linear in corpus_base().linears.items() if name.endswith(TARGETED))
    reader = reader_type(config, linears, CONFIG)
    rules = dict(reader.shared_layout())
    for linear in linears:
        rules.update({f"{PREFIX}{linear.name}.{suffix}": rule for suffix, rule in reader.layout(linear).items()})
    generator = torch.Generator().manual_seed(0)
    tensors = {name: _random(rule, generator) for name, rule in rules.items()}
    for name in tensors:  # a copy that PEFT keeps beside a linear
        shared = f"base_model.{name.rpartition('.')[2]}"
        tensors[name] = tensors.get(shared, tensors[name]).clone()
        if name.endswith(".zeros"):
            tensors[name] = torch.zeros_like(tensors[name])
        if "frod_s_" in name:  # all linears here have 16 inputs
            tensors[name] = tensors[name] % 16 if "indices" in name else torch.full_like(tensors[name], 16)
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def _random(rule: TensorRule, generator: torch.Generator) -> torch.Tensor:
    if "F32" in rule.dtypes:
        return torch.randn(rule.shape, generator=generator)
    count = 1
    for size in rule.shape:
        count *= size
    return (torch.arange(count) % 40).to(torch.int32 if "I32" in rule.dtypes else torch.int64).reshape(rule.shape)


GOOD_KINDS: dict[str, Callable[[Path], Path]] = {kind: partial(write_good_kind, kind=kind) for kind in CONFIGS}


def _tensor_names(kind: str) -> Iterator[tuple[str, TensorRule]]:
    """Shared tensors, and those of one linear."""
    config = {"target_modules": list(TARGETED), **CONFIGS[kind]}
    linears = tuple(linear for name, linear in corpus_base().linears.items() if name.endswith(TARGETED))
    reader = READERS[kind.upper()](config, linears, CONFIG)
    yield from reader.shared_layout().items()
    for suffix, rule in reader.layout(corpus_base().linears[V0]).items():
        yield f"{V0_TENSOR}.{suffix}", rule


def _damage(kind: str) -> Iterator[BadAdapter]:
    """What is tried with every tensor of every type, and with every config."""
    for name, rule in _tensor_names(kind):
        short = name.removeprefix(f"{V0_TENSOR}.")
        longer = (*rule.shape[:-1], rule.shape[-1] + 1)

        def case(what: str, code: str, value: Any, name: str = name, short: str = short) -> BadAdapter:
            return BadAdapter(f"{short} {what}", kind, edit_tensors({name: value}), ((code, name),))

        if not rule.optional:
            yield case("missing", "missing_tensor", None)
        yield case("of another shape", "shape_mismatch", lambda old, shape=longer: torch.ones(shape, dtype=old.dtype))
        yield case("of one more dimension", "shape_mismatch", lambda old: old.reshape(1, -1, 1)[:, :, :])
        if "F32" in rule.dtypes:
            yield case("with NaN", "non_finite", set_value(float("nan")))
            yield case("with infinity", "non_finite", lambda old: set_value(float("-inf"))(old.bfloat16()))
            yield case("with a huge value", "value_out_of_range", set_value(1e30))
            yield case("of integers", "unsupported_dtype", lambda old: old.to(torch.int32))
        else:
            yield case("of floats", "unsupported_dtype", lambda old: old.float())
    stray = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"
    yield BadAdapter("a stray tensor", kind, edit_tensors({stray: torch.ones(4, 24)}), (("unexpected_tensor", stray),))
    for field, value, code in (
        ("wings", 2, "unknown_field"),
        ("target_modules", ".*_proj", "regex_target"),
        ("target_modules", ["q_proj", "lm_head"], "unsupported_target"),
        ("task_type", "SEQ_CLS", "unsupported_feature"),
        ("modules_to_save", ["lm_head"], "unsupported_feature"),
        ("bias", "all", "unsupported_feature"),
    ):
        if field in READERS[kind.upper()].fields or field == "wings":
            name = f"{field}={json.dumps(value)}"
            yield BadAdapter(name, kind, edit_config(**{field: value}), ((code, f"{CONFIG}:{field}"),))


def _config(kind: str, field: str, value: Any, code: str) -> BadAdapter:
    name = f"config {field}={json.dumps(value)[:60] if value is not ... else 'missing'}"
    return BadAdapter(name, kind, edit_config(**{field: value}), ((code, f"{CONFIG}:{field}"),))


def _reasons(kind: str, name: str, spoil: Callable[[Path], None], *reasons: tuple[str, str]) -> BadAdapter:
    """A case whose reasons are among others (one wrong rank misshapes every tensor)."""
    return BadAdapter(name, kind, spoil, reasons, is_exact=False)


def _in_turn(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def _raise(amount: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda old: old + amount


_ADALORA = (
    _config("adalora", "init_r", ..., "missing_field"),
    _config("adalora", "init_r", 0, "rank_out_of_range"),
    _config("adalora", "use_rslora", True, "unsupported_feature"),
    _config("adalora", "use_dora", True, "unsupported_feature"),
    _reasons(
        "adalora", "another init_r", edit_config(init_r=4, rank_pattern=None), ("shape_mismatch", f"{V0_TENSOR}.lora_A")
    ),
    _reasons("adalora", "flags lost", edit_config(rank_pattern=None), ("shape_mismatch", f"{V0_TENSOR}.lora_E")),
    BadAdapter(
        "too few flags",
        "adalora",
        edit_config(rank_pattern={f"{V0}.lora_E": [True, True]}),
        (("invalid_value", f"{CONFIG}:rank_pattern:{V0}.lora_E"),),
    ),
    BadAdapter(
        "flags of no linear",
        "adalora",
        edit_config(rank_pattern={"model.layers.9.self_attn.v_proj.lora_E": [True, True, False]}),
        (("target_not_found", f"{CONFIG}:rank_pattern:model.layers.9.self_attn.v_proj.lora_E"),),
    ),
    _reasons(
        "adalora",
        "tensors of a linear without a direction left",
        edit_config(rank_pattern={f"{V0}.lora_E": [False, False, False]}),
        ("shape_mismatch", f"{V0_TENSOR}.lora_A"),
    ),
    BadAdapter(
        "no direction left anywhere",
        "adalora",
        edit_config(
            rank_pattern={
                f"model.layers.{layer}.self_attn.{name}.lora_E": [False] * 3 for layer in range(2) for name in TARGETED
            }
        ),
        (("rank_out_of_range", f"{CONFIG}:rank_pattern"),),
    ),
)

_VERA = (
    _config("vera", "r", ..., "missing_field"),
    _config("vera", "projection_prng_key", "5", "invalid_value"),
    _config("vera", "projection_prng_key", 1 << 70, "invalid_value"),
    _reasons("vera", "another r", edit_config(r=5), ("shape_mismatch", "base_model.vera_A")),
    BadAdapter(
        "projections that the config says are not there",
        "vera",
        edit_config(save_projection=False),
        (("unexpected_tensor", "base_model.vera_A"), ("unexpected_tensor", "base_model.vera_B")),
    ),
    _reasons(
        "vera",
        "projections of a narrower base",
        edit_tensors({"base_model.vera_A": torch.ones(4, 8), "base_model.vera_B": torch.ones(8, 4)}),
        ("shape_mismatch", "base_model.vera_A"),
        ("shape_mismatch", "base_model.vera_B"),
    ),
)

_PRODUCTS = (
    _reasons("loha", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.hada_w1_a")),
    BadAdapter(
        "a pattern of rank 0",
        "loha",
        edit_config(rank_pattern={"q_proj": 0}),
        (("rank_out_of_range", f"{CONFIG}:rank_pattern:q_proj"),),
    ),
    _config("loha", "fan_in_fan_out", False, "unknown_field"),
    _config("loha", "alpha", 0, "invalid_value"),
    _reasons("lokr", "another factor", edit_config(decompose_factor=2), ("shape_mismatch", f"{V0_TENSOR}.lokr_w1")),
    _reasons("lokr", "another split", edit_config(r=8), ("missing_tensor", f"{V0_TENSOR}.lokr_w2")),
    _config("lokr", "decompose_factor", 0, "invalid_value"),
    _config("lokr", "decompose_both", 1, "invalid_value"),
)

_BLOCKS = (
    _config("miss", "init_weights", "bone", "unsupported_feature"),
    _reasons(
        "miss", "one block for all", edit_config(init_weights="bat"), ("shape_mismatch", f"{V0_TENSOR}.miss_block")
    ),
    _reasons("miss", "blocks of 3", edit_config(init_weights="bat", r=3), ("invalid_value", f"{CONFIG}:r")),
    _reasons("miss", "another r", edit_config(r=5), ("shape_mismatch", f"{V0_TENSOR}.miss_block")),
    _reasons("miss", "more rows than inputs", edit_config(r=17), ("rank_out_of_range", f"{CONFIG}:r")),
    _reasons(
        "miss",
        "a width that does not divide",
        edit_config(init_weights="mini", mini_r=3),
        ("invalid_value", f"{CONFIG}:mini_r"),
    ),
    _reasons("gralora", "a k that does not divide", edit_config(gralora_k=3), ("invalid_value", f"{CONFIG}:gralora_k")),
    _reasons("gralora", "another k", edit_config(gralora_k=4), ("shape_mismatch", f"{V0_TENSOR}.gralora_A")),
    _config("gralora", "hybrid_r", -1, "rank_out_of_range"),
    BadAdapter(
        "hybrid factors that the config does not tell of",
        "gralora",
        edit_config(hybrid_r=0),
        tuple(
            ("unexpected_tensor", f"{PREFIX}model.layers.{layer}.self_attn.{name}.gralora_{part}_general.weight")
            for layer in range(2)
            for name in TARGETED
            for part in "AB"
        ),
    ),
)

_CUT = f"{V0_TENSOR}.vblora_logits_B"


def _cut_vblora(index: int = 0, weight: float = 0.5) -> Callable[[Path], None]:
    """Every matrix of logits by the best two of its six vectors; one index and one part of them are chosen."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        for name in [name for name in tensors if "vblora_logits" in name]:
            shape = tensors.pop(name).shape[:-1]
            indices = torch.arange(2, dtype=torch.uint8).expand(*shape, 2).contiguous()
            weights = torch.full((*shape, 1), 0.5)
            if name == _CUT:
                indices[0, 0, 0], weights[0, 0, 0] = index, weight
            tensors |= {f"{name}_topk_indices": indices, f"{name}_topk_weights": weights}
        save_file(tensors, folder / TENSORS)
        edit_config(save_only_topk_weights=True)(folder)

    return spoil


_INDICES = f"{V0_TENSOR}.unilora_indices_B"
_LORA_A = f"{V0_TENSOR}.supertuning_lora_A"
_POSITIONS = f"{V0_TENSOR}.supertuning_indices"
_SPREAD = (
    _reasons("delora", "another r", edit_config(r=4), ("shape_mismatch", f"{V0_TENSOR}.delora_A")),
    _reasons(
        "delora",
        "a rank of one linear",
        edit_config(rank_pattern={"v_proj": 2}),
        ("shape_mismatch", f"{V0_TENSOR}.delora_B"),
    ),
    _config("vblora", "save_only_topk_weights", "yes", "invalid_value"),
    _reasons(
        "vblora",
        "whole logits where the config says the best alone",
        edit_config(save_only_topk_weights=True),
        ("missing_tensor", f"{V0_TENSOR}.vblora_logits_A_topk_indices"),
        ("unexpected_tensor", f"{V0_TENSOR}.vblora_logits_A"),
    ),
    BadAdapter(
        "a vector beyond the bank", "vblora", _cut_vblora(index=6), (("index_out_of_range", f"{_CUT}_topk_indices"),)
    ),
    BadAdapter("parts that exceed 1", "vblora", _cut_vblora(weight=1.5), (("invalid_value", f"{_CUT}_topk_weights"),)),
    BadAdapter("a part below 0", "vblora", _cut_vblora(weight=-0.5), (("invalid_value", f"{_CUT}_topk_weights"),)),
    _config("vblora", "topk", 7, "invalid_value"),
    _config("vblora", "vector_length", ..., "missing_field"),
    _reasons(
        "vblora", "vectors that do not fit", edit_config(vector_length=5), ("invalid_value", f"{CONFIG}:vector_length")
    ),
    _reasons("vblora", "another bank", edit_config(num_vectors=7), ("shape_mismatch", "base_model.vblora_vector_bank")),
    _reasons(
        "unilora",
        "indices that the config says are not there",
        edit_config(save_indices=False),
        ("unexpected_tensor", f"{V0_TENSOR}.unilora_indices_A"),
    ),
    _reasons(
        "unilora", "another length", edit_config(theta_d_length=41), ("shape_mismatch", "base_model.unilora_theta_d")
    ),
    _config("unilora", "save_indices", "yes", "invalid_value"),
    _config("unilora", "proj_seed", -1, "invalid_value"),
    _config("unilora", "proj_seed", None, "invalid_value"),
    BadAdapter(
        "an index beyond theta", "unilora", edit_tensors({_INDICES: _raise(1000)}), (("index_out_of_range", _INDICES),)
    ),
    BadAdapter(
        "an index below 0", "unilora", edit_tensors({_INDICES: _raise(-1000)}), (("index_out_of_range", _INDICES),)
    ),
    _config("tinylora", "weight_tying", 1.5, "invalid_value"),
    _config("tinylora", "projection_seed", 0.5, "invalid_value"),
    _reasons(
        "tinylora",
        "vectors of groups that are not there",
        edit_config(weight_tying=0.5),
        ("missing_tensor", "base_model.tinylora_v.1"),
    ),
    _reasons(
        "tinylora",
        "projections that the config says are not there",
        edit_config(save_projection=False),
        ("unexpected_tensor", f"{V0_TENSOR}.tinylora_P"),
    ),
    _reasons("tinylora", "another u", edit_config(u=4), ("shape_mismatch", f"{V0_TENSOR}.tinylora_P")),
    BadAdapter(
        "vectors of more groups",
        "tinylora",
        edit_tensors({"base_model.tinylora_v.1": torch.ones(3)}),
        (("unexpected_tensor", "base_model.tinylora_v.1"),),
    ),
    _config("hra", "apply_GS", 1, "invalid_value"),
    _reasons("hra", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.hra_u")),
    _reasons("hra", "more directions than inputs", edit_config(r=17), ("rank_out_of_range", f"{CONFIG}:r")),
    BadAdapter(
        "a direction of length 0",
        "hra",
        edit_tensors({f"{V0_TENSOR}.hra_u": lambda old: old * torch.tensor([1.0, 0.0])}),
        (("invalid_value", f"{V0_TENSOR}.hra_u"),),
    ),
    BadAdapter(
        "directions that depend on each other",
        "hra",
        _in_turn(edit_config(apply_GS=True), edit_tensors({f"{V0_TENSOR}.hra_u": lambda old: old[:, :1].repeat(1, 2)})),
        (("invalid_value", f"{V0_TENSOR}.hra_u"),),
    ),
    _config("supertuning", "save_precomputed_indices", False, "seed_not_usable"),
    _config("supertuning", "r", 0, "rank_out_of_range"),
    _config("supertuning", "lora_alpha", 8, "invalid_value"),
    _reasons(
        "supertuning",
        "without its LoRA",
        edit_config(r=4),
        ("missing_tensor", f"{V0_TENSOR}.supertuning_lora_A.weight"),
    ),
    _config("supertuning", "sparsity", 1.0, "invalid_value"),
    _reasons("supertuning", "another share", edit_config(sparsity=0.8), ("shape_mismatch", _POSITIONS)),
    _reasons("supertuning", "a share of nothing", edit_config(sparsity=0.999), ("invalid_value", f"{CONFIG}:sparsity")),
    BadAdapter(
        "a position beyond the layer",
        "supertuning",
        edit_tensors({_POSITIONS: _raise(128)}),
        (("index_out_of_range", _POSITIONS),),
    ),
    BadAdapter(
        "a position below 0",
        "supertuning",
        edit_tensors({_POSITIONS: _raise(-1)}),
        (("index_out_of_range", _POSITIONS),),
    ),
    BadAdapter(
        "a position twice",
        "supertuning",
        edit_tensors({_POSITIONS: lambda old: torch.cat([old[:1], old[:-1]])}),
        (("duplicate_index", _POSITIONS),),
    ),
)

_LAMBDA, _KERNEL = f"{V0_TENSOR}.randlora_lambda", f"{V0_TENSOR}.c3a_kernel"
_SPECTRA = (
    *(
        case
        for kind in ("fourierft", "waveft")
        for case in (
            _config(kind, "n_frequency", ..., "missing_field"),
            _config(kind, "n_frequency", 0, "invalid_value"),
            _config(kind, "random_loc_seed", None, "invalid_value"),
            _config(kind, "scaling", 0, "invalid_value"),
            _reasons(
                kind, "another number", edit_config(n_frequency=4), ("shape_mismatch", f"{V0_TENSOR}.{kind}_spectrum")
            ),
            _reasons(
                kind,
                "more coefficients than entries",
                edit_config(n_frequency=129),
                ("invalid_value", f"{CONFIG}:n_frequency"),
            ),
            BadAdapter(
                "a pattern of 0",
                kind,
                edit_config(n_frequency_pattern={"q_proj": 0}),
                (("invalid_value", f"{CONFIG}:n_frequency_pattern:q_proj"),),
            ),
        )
    ),
    _config("waveft", "wavelet_family", "sym4", "unsupported_feature"),
    _reasons(
        "waveft",
        "shares by size",
        edit_config(proportional_parameters=True),
        ("shape_mismatch", f"{V0_TENSOR}.waveft_spectrum"),
    ),
    _config("c3a", "block_size", ..., "missing_field"),
    _config("c3a", "fan_in_fan_out", False, "unknown_field"),
    _reasons("c3a", "a block of 3", edit_config(block_size=3), ("invalid_value", f"{CONFIG}:block_size")),
    _reasons("c3a", "another block", edit_config(block_size=4), ("shape_mismatch", _KERNEL)),
    _config("randlora", "save_projection", False, "seed_not_usable"),
    _config("randlora", "randlora_alpha", ..., "missing_field"),
    _reasons("randlora", "another r", edit_config(r=4), ("shape_mismatch", _LAMBDA)),
    BadAdapter(
        "a basis of its own",
        "randlora",
        edit_tensors({f"{V0_TENSOR}.randlora_A": lambda old: old + 1}),
        (("invalid_value", f"{V0_TENSOR}.randlora_A"),),
    ),
    _config("deft", "decomposition_method", "svd", "invalid_value"),
    _reasons("deft", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.deft_P")),
    _reasons("deft", "R of a removal", edit_config(para=True), ("unexpected_tensor", f"{V0_TENSOR}.deft_R")),
    BadAdapter(
        "columns that depend on each other",
        "deft",
        edit_tensors({f"{V0_TENSOR}.deft_P": lambda old: old[:, :1].repeat(1, 2)}),
        (("invalid_value", f"{V0_TENSOR}.deft_P"),),
    ),
    _config("hira", "bias", "none", "unknown_field"),
    _reasons("hira", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.hira_A")),
)

_ROLE = "self_attn_v_proj"
_BASE_OF = (
    _config("pvera", "sample_at_inference", True, "unsupported_feature"),
    _config("pvera", "projection_prng_key", None, "invalid_value"),
    _reasons("pvera", "another r", edit_config(r=3), ("shape_mismatch", "base_model.pvera_A")),
    BadAdapter(
        "projections that the config says are not there",
        "pvera",
        edit_config(save_projection=False),
        (("unexpected_tensor", "base_model.pvera_A"), ("unexpected_tensor", "base_model.pvera_B")),
    ),
    _config("psoft", "psoft_svd", "lowrank", "unsupported_feature"),
    _config("psoft", "ab_svd_init", "svd", "invalid_value"),
    _config("psoft", "psoft_orth", ..., "missing_field"),
    _config("psoft", "cayley_neumann_eps", 1.0, "invalid_value"),
    _config("psoft", "num_cayley_neumann_terms", 65, "invalid_value"),
    _reasons("psoft", "more directions than the weight has", edit_config(r=9), ("rank_out_of_range", f"{CONFIG}:r")),
    _reasons(
        "psoft", "a free matrix", edit_config(psoft_orth=False), ("shape_mismatch", f"{V0_TENSOR}.psoft_R.weight")
    ),
    _reasons(
        "psoft",
        "scales that the config says are not there",
        edit_config(psoft_mag_a=False),
        ("unexpected_tensor", f"{V0_TENSOR}.psoft_R.vector_a"),
    ),
    BadAdapter(
        "a rotation that is none any more",
        "psoft",
        edit_tensors({f"{V0_TENSOR}.psoft_R.weight": lambda old: old * 1e4}),
        (("invalid_value", f"{V0_TENSOR}.psoft_R.weight"),),
    ),
    _config("glora", "config_A_B", "matrix", "invalid_value"),
    _config("glora", "config_C", "constant", "invalid_value"),
    _config("glora", "config_D_E", ..., "missing_field"),
    _reasons("glora", "rows", edit_config(config_A_B="vector"), ("missing_tensor", f"{V0_TENSOR}.glora_A.X")),
    _reasons("glora", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.glora_B.Xd")),
    _config("frod", "save_projection", False, "seed_not_usable"),
    _config("frod", "sparse_rate", ..., "missing_field"),
    _reasons(
        "frod", "another share", edit_config(sparse_rate=0.2), ("shape_mismatch", f"{V0_TENSOR}.frod_lambda_s_values")
    ),
    BadAdapter(
        "a position beyond the basis",
        "frod",
        edit_tensors({f"base_model.frod_s_indices.{_ROLE}": _raise(16)}),
        (("index_out_of_range", f"base_model.frod_s_indices.{_ROLE}"),),
    ),
    BadAdapter(
        "a position below 0",
        "frod",
        edit_tensors({f"base_model.frod_s_indices.{_ROLE}": _raise(-1)}),
        (("index_out_of_range", f"base_model.frod_s_indices.{_ROLE}"),),
    ),
    BadAdapter(
        "another size",
        "frod",
        edit_tensors({f"base_model.frod_s_size.{_ROLE}": _raise(1)}),
        (("shape_mismatch", f"base_model.frod_s_size.{_ROLE}"),),
    ),
    BadAdapter(
        "a basis without an inverse",
        "frod",
        edit_tensors({f"base_model.frod_V.{_ROLE}": lambda old: old[:, :1].repeat(1, 16)}),
        (("invalid_value", f"base_model.frod_V.{_ROLE}"),),
    ),
)

KIND_CORPUS: tuple[BadAdapter, ...] = (
    *(case for kind in CONFIGS for case in _damage(kind)),
    *_ADALORA,
    *_VERA,
    *_PRODUCTS,
    *_BLOCKS,
    *_SPREAD,
    *_SPECTRA,
    *_BASE_OF,
)
