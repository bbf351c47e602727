"""Types of spectra, circulants and bases: FourierFT, WaveFT, C3A, RandLoRA, DEFT, HiRA."""

from __future__ import annotations

from deltatest.adapter_corpus import CONFIG, BadAdapter, edit_config, edit_tensors
from deltatest.kind_corpus.damage import among, config_case
from deltatest.kind_corpus.good import V0_TENSOR

_LAMBDA, _KERNEL = f"{V0_TENSOR}.randlora_lambda", f"{V0_TENSOR}.c3a_kernel"
SPECTRA = (
    *(
        case
        for kind in ("fourierft", "waveft")
        for case in (
            config_case(kind, "n_frequency", ..., "missing_field"),
            config_case(kind, "n_frequency", 0, "invalid_value"),
            config_case(kind, "random_loc_seed", None, "invalid_value"),
            config_case(kind, "scaling", 0, "invalid_value"),
            among(
                kind, "another number", edit_config(n_frequency=4), ("shape_mismatch", f"{V0_TENSOR}.{kind}_spectrum")
            ),
            among(
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
    config_case("waveft", "wavelet_family", "sym4", "unsupported_feature"),
    among(
        "waveft",
        "shares by size",
        edit_config(proportional_parameters=True),
        ("shape_mismatch", f"{V0_TENSOR}.waveft_spectrum"),
    ),
    config_case("c3a", "block_size", ..., "missing_field"),
    config_case("c3a", "fan_in_fan_out", False, "unknown_field"),
    among("c3a", "a block of 3", edit_config(block_size=3), ("invalid_value", f"{CONFIG}:block_size")),
    among("c3a", "another block", edit_config(block_size=4), ("shape_mismatch", _KERNEL)),
    BadAdapter(
        "bases that the seed was to make up for",
        "randlora",
        edit_config(save_projection=False),
        (("unexpected_tensor", "base_model.randlora_A"), ("unexpected_tensor", f"{V0_TENSOR}.randlora_A")),
        is_exact=False,
    ),
    config_case("randlora", "projection_prng_key", 1 << 63, "invalid_value"),
    config_case("randlora", "very_sparse", 1, "invalid_value"),
    config_case("randlora", "randlora_alpha", ..., "missing_field"),
    among("randlora", "another r", edit_config(r=4), ("shape_mismatch", _LAMBDA)),
    BadAdapter(
        "a basis of its own",
        "randlora",
        edit_tensors({f"{V0_TENSOR}.randlora_A": lambda old: old + 1}),
        (("invalid_value", f"{V0_TENSOR}.randlora_A"),),
    ),
    config_case("deft", "decomposition_method", "svd", "invalid_value"),
    among("deft", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.deft_P")),
    among("deft", "R of a removal", edit_config(para=True), ("unexpected_tensor", f"{V0_TENSOR}.deft_R")),
    BadAdapter(
        "columns that depend on each other",
        "deft",
        edit_tensors({f"{V0_TENSOR}.deft_P": lambda old: old[:, :1].repeat(1, 2)}),
        (("invalid_value", f"{V0_TENSOR}.deft_P"),),
    ),
    config_case("hira", "bias", "none", "unknown_field"),
    among("hira", "another r", edit_config(r=3), ("shape_mismatch", f"{V0_TENSOR}.hira_A")),
)
