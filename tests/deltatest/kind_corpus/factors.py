"""Types of low-rank factors, of one linear or shared by all: AdaLoRA, VeRA, products and blocks."""

from __future__ import annotations

import torch

from deltatest.adapter_corpus import CONFIG, PREFIX, BadAdapter, edit_config, edit_tensors
from deltatest.kind_corpus.damage import among, config_case
from deltatest.kind_corpus.good import TARGETED, V0, V0_TENSOR

ADALORA = (
    config_case("adalora", "init_r", ..., "missing_field"),
    config_case("adalora", "init_r", 0, "rank_out_of_range"),
    config_case("adalora", "use_rslora", True, "unsupported_feature"),
    config_case("adalora", "use_dora", True, "unsupported_feature"),
    among(
        "adalora", "another init_r", edit_config(init_r=4, rank_pattern=None), ("shape_mismatch", f"{V0_TENSOR}.lora_A")
    ),
    among("adalora", "flags lost", edit_config(rank_pattern=None), ("shape_mismatch", f"{V0_TENSOR}.lora_E")),
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
    among(
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

VERA = (
    config_case("vera", "r", ..., "missing_field"),
    config_case("vera", "projection_prng_key", "5", "invalid_value"),
    config_case("vera", "projection_prng_key", 1 << 70, "invalid_value"),
    among("vera", "another r", edit_config(r=5), ("shape_mismatch", "base_model.vera_A")),
    BadAdapter(
        "projections that the config says are not there",
        "vera",
        edit_config(save_projection=False),
        (("unexpected_tensor", "base_model.vera_A"), ("unexpected_tensor", "base_model.vera_B")),
    ),
    among(
        "vera",
        "projections of a narrower base",
        edit_tensors({"base_model.vera_A": torch.ones(4, 8), "base_model.vera_B": torch.ones(8, 4)}),
        ("shape_mismatch", "base_model.vera_A"),
        ("shape_mismatch", "base_model.vera_B"),
    ),
)

PRODUCTS = (
    among("loha", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.hada_w1_a")),
    BadAdapter(
        "a pattern of rank 0",
        "loha",
        edit_config(rank_pattern={"q_proj": 0}),
        (("rank_out_of_range", f"{CONFIG}:rank_pattern:q_proj"),),
    ),
    config_case("loha", "fan_in_fan_out", False, "unknown_field"),
    config_case("loha", "alpha", 0, "invalid_value"),
    among("lokr", "another factor", edit_config(decompose_factor=2), ("shape_mismatch", f"{V0_TENSOR}.lokr_w1")),
    among("lokr", "another split", edit_config(r=8), ("missing_tensor", f"{V0_TENSOR}.lokr_w2")),
    config_case("lokr", "decompose_factor", 0, "invalid_value"),
    config_case("lokr", "decompose_both", 1, "invalid_value"),
)

BLOCKS = (
    config_case("miss", "init_weights", "bone", "unsupported_feature"),
    among("miss", "one block for all", edit_config(init_weights="bat"), ("shape_mismatch", f"{V0_TENSOR}.miss_block")),
    among("miss", "blocks of 3", edit_config(init_weights="bat", r=3), ("invalid_value", f"{CONFIG}:r")),
    among("miss", "another r", edit_config(r=5), ("shape_mismatch", f"{V0_TENSOR}.miss_block")),
    among("miss", "more rows than inputs", edit_config(r=17), ("rank_out_of_range", f"{CONFIG}:r")),
    among(
        "miss",
        "a width that does not divide",
        edit_config(init_weights="mini", mini_r=3),
        ("invalid_value", f"{CONFIG}:mini_r"),
    ),
    among("gralora", "a k that does not divide", edit_config(gralora_k=3), ("invalid_value", f"{CONFIG}:gralora_k")),
    among("gralora", "another k", edit_config(gralora_k=4), ("shape_mismatch", f"{V0_TENSOR}.gralora_A")),
    config_case("gralora", "hybrid_r", -1, "rank_out_of_range"),
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
