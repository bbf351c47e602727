"""PVeRA, PSOFT, GLoRA and FRoD."""

from __future__ import annotations

from deltatest.adapter_corpus import CONFIG, BadAdapter, edit_config, edit_tensors
from deltatest.kind_corpus.damage import among, config_case, raised
from deltatest.kind_corpus.good import V0_TENSOR

_ROLE = "self_attn_v_proj"
OF_BASE = (
    config_case("pvera", "sample_at_inference", True, "unsupported_feature"),
    config_case("pvera", "projection_prng_key", None, "invalid_value"),
    among("pvera", "another r", edit_config(r=3), ("shape_mismatch", "base_model.pvera_A")),
    BadAdapter(
        "projections that the config says are not there",
        "pvera",
        edit_config(save_projection=False),
        (("unexpected_tensor", "base_model.pvera_A"), ("unexpected_tensor", "base_model.pvera_B")),
    ),
    config_case("psoft", "psoft_svd", "lowrank", "unsupported_feature"),
    config_case("psoft", "ab_svd_init", "svd", "invalid_value"),
    config_case("psoft", "psoft_orth", ..., "missing_field"),
    config_case("psoft", "cayley_neumann_eps", 1.0, "invalid_value"),
    config_case("psoft", "num_cayley_neumann_terms", 65, "invalid_value"),
    among("psoft", "more directions than the weight has", edit_config(r=9), ("rank_out_of_range", f"{CONFIG}:r")),
    among("psoft", "a free matrix", edit_config(psoft_orth=False), ("shape_mismatch", f"{V0_TENSOR}.psoft_R.weight")),
    among(
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
    config_case("glora", "config_A_B", "matrix", "invalid_value"),
    config_case("glora", "config_C", "constant", "invalid_value"),
    config_case("glora", "config_D_E", ..., "missing_field"),
    among("glora", "rows", edit_config(config_A_B="vector"), ("missing_tensor", f"{V0_TENSOR}.glora_A.X")),
    among("glora", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.glora_B.Xd")),
    config_case("frod", "save_projection", False, "seed_not_usable"),
    config_case("frod", "sparse_rate", ..., "missing_field"),
    among(
        "frod", "another share", edit_config(sparse_rate=0.2), ("shape_mismatch", f"{V0_TENSOR}.frod_lambda_s_values")
    ),
    BadAdapter(
        "a position beyond the basis",
        "frod",
        edit_tensors({f"base_model.frod_s_indices.{_ROLE}": raised(16)}),
        (("index_out_of_range", f"base_model.frod_s_indices.{_ROLE}"),),
    ),
    BadAdapter(
        "a position below 0",
        "frod",
        edit_tensors({f"base_model.frod_s_indices.{_ROLE}": raised(-1)}),
        (("index_out_of_range", f"base_model.frod_s_indices.{_ROLE}"),),
    ),
    BadAdapter(
        "another size",
        "frod",
        edit_tensors({f"base_model.frod_s_size.{_ROLE}": raised(1)}),
        (("shape_mismatch", f"base_model.frod_s_size.{_ROLE}"),),
    ),
    BadAdapter(
        "a basis without an inverse",
        "frod",
        edit_tensors({f"base_model.frod_V.{_ROLE}": lambda old: old[:, :1].repeat(1, 16)}),
        (("invalid_value", f"base_model.frod_V.{_ROLE}"),),
    ),
)
