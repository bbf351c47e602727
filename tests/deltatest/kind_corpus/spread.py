"""Few numbers spread over many places, or inputs turned: DeLoRA, VB-LoRA, UniLoRA, TinyLoRA, HRA, Supertuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deltatest.adapter_corpus import CONFIG, TENSORS, BadAdapter, edit_config, edit_tensors
from deltatest.kind_corpus.damage import among, config_case, in_turn, raised
from deltatest.kind_corpus.good import V0_TENSOR

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
SPREAD = (
    among("delora", "another r", edit_config(r=4), ("shape_mismatch", f"{V0_TENSOR}.delora_A")),
    among(
        "delora",
        "a rank of one linear",
        edit_config(rank_pattern={"v_proj": 2}),
        ("shape_mismatch", f"{V0_TENSOR}.delora_B"),
    ),
    config_case("vblora", "save_only_topk_weights", "yes", "invalid_value"),
    among(
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
    config_case("vblora", "topk", 7, "invalid_value"),
    config_case("vblora", "vector_length", ..., "missing_field"),
    among(
        "vblora", "vectors that do not fit", edit_config(vector_length=5), ("invalid_value", f"{CONFIG}:vector_length")
    ),
    among("vblora", "another bank", edit_config(num_vectors=7), ("shape_mismatch", "base_model.vblora_vector_bank")),
    among(
        "unilora",
        "indices that the config says are not there",
        edit_config(save_indices=False),
        ("unexpected_tensor", f"{V0_TENSOR}.unilora_indices_A"),
    ),
    among(
        "unilora", "another length", edit_config(theta_d_length=41), ("shape_mismatch", "base_model.unilora_theta_d")
    ),
    config_case("unilora", "save_indices", "yes", "invalid_value"),
    among(
        "tinylora",
        "more projections than are drawn",
        edit_config(save_projection=False, r=8, u=1 << 24),
        ("seed_not_usable", f"{CONFIG}:projection_seed"),
    ),
    config_case("unilora", "proj_seed", -1, "invalid_value"),
    config_case("unilora", "proj_seed", None, "invalid_value"),
    BadAdapter(
        "an index beyond theta", "unilora", edit_tensors({_INDICES: raised(1000)}), (("index_out_of_range", _INDICES),)
    ),
    BadAdapter(
        "an index below 0", "unilora", edit_tensors({_INDICES: raised(-1000)}), (("index_out_of_range", _INDICES),)
    ),
    config_case("tinylora", "weight_tying", 1.5, "invalid_value"),
    config_case("tinylora", "projection_seed", 0.5, "invalid_value"),
    among(
        "tinylora",
        "vectors of groups that are not there",
        edit_config(weight_tying=0.5),
        ("missing_tensor", "base_model.tinylora_v.1"),
    ),
    among(
        "tinylora",
        "projections that the config says are not there",
        edit_config(save_projection=False),
        ("unexpected_tensor", f"{V0_TENSOR}.tinylora_P"),
    ),
    among("tinylora", "another u", edit_config(u=4), ("shape_mismatch", f"{V0_TENSOR}.tinylora_P")),
    BadAdapter(
        "vectors of more groups",
        "tinylora",
        edit_tensors({"base_model.tinylora_v.1": torch.ones(3)}),
        (("unexpected_tensor", "base_model.tinylora_v.1"),),
    ),
    config_case("hra", "apply_GS", 1, "invalid_value"),
    among("hra", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.hra_u")),
    among("hra", "more directions than inputs", edit_config(r=17), ("rank_out_of_range", f"{CONFIG}:r")),
    BadAdapter(
        "a direction of length 0",
        "hra",
        edit_tensors({f"{V0_TENSOR}.hra_u": lambda old: old * torch.tensor([1.0, 0.0])}),
        (("invalid_value", f"{V0_TENSOR}.hra_u"),),
    ),
    BadAdapter(
        "directions that depend on each other",
        "hra",
        in_turn(edit_config(apply_GS=True), edit_tensors({f"{V0_TENSOR}.hra_u": lambda old: old[:, :1].repeat(1, 2)})),
        (("invalid_value", f"{V0_TENSOR}.hra_u"),),
    ),
    config_case("supertuning", "save_precomputed_indices", False, "seed_not_usable"),
    config_case("supertuning", "r", 0, "rank_out_of_range"),
    config_case("supertuning", "lora_alpha", 8, "invalid_value"),
    among(
        "supertuning",
        "without its LoRA",
        edit_config(r=4),
        ("missing_tensor", f"{V0_TENSOR}.supertuning_lora_A.weight"),
    ),
    config_case("supertuning", "sparsity", 1.0, "invalid_value"),
    among("supertuning", "another share", edit_config(sparsity=0.8), ("shape_mismatch", _POSITIONS)),
    among("supertuning", "a share of nothing", edit_config(sparsity=0.999), ("invalid_value", f"{CONFIG}:sparsity")),
    BadAdapter(
        "a position beyond the layer",
        "supertuning",
        edit_tensors({_POSITIONS: raised(128)}),
        (("index_out_of_range", _POSITIONS),),
    ),
    BadAdapter(
        "a position below 0",
        "supertuning",
        edit_tensors({_POSITIONS: raised(-1)}),
        (("index_out_of_range", _POSITIONS),),
    ),
    BadAdapter(
        "a position twice",
        "supertuning",
        edit_tensors({_POSITIONS: lambda old: torch.cat([old[:1], old[:-1]])}),
        (("duplicate_index", _POSITIONS),),
    ),
)
