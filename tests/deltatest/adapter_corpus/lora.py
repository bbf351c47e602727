"""Types that are not served, fields of a PEFT config, and tensors of a LoRA."""

from __future__ import annotations

from typing import Any

import torch

from deltatest.adapter_corpus.good import CONFIG, PREFIX, Q0, Q0_A, Q0_B
from deltatest.adapter_corpus.spoil import (
    BadAdapter,
    config_case,
    edit_config,
    edit_header,
    edit_tensors,
    set_value,
    tensor_case,
)


def _rename_layers(header: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("model.layers", "transformer.h"): value for key, value in header.items()}


KINDS = tuple(
    config_case("peft_type", kind, "unsupported_kind")
    for kind in ("ADAPTION_PROMPT", "XLORA", "ADAMSS", "OSF", "NO_SUCH_KIND", ["LORA"])
)

FIELDS = (
    config_case("peft_type", ..., "missing_field", name="without peft_type"),
    config_case("r", ..., "missing_field", name="without r"),
    config_case("target_modules", ..., "missing_field", name="without target_modules"),
    config_case("r", 0, "rank_out_of_range"),
    config_case("r", 10**6, "rank_out_of_range"),
    config_case("r", True, "rank_out_of_range"),
    config_case("r", "8", "rank_out_of_range"),
    config_case("lora_alpha", 10**9, "invalid_value"),
    config_case("lora_alpha", -1, "invalid_value"),
    config_case("use_rslora", "yes", "invalid_value"),
    BadAdapter(
        "DoRA without magnitudes",
        "lora",
        edit_config(use_dora=True),
        (("missing_tensor", f"{PREFIX}{Q0}.lora_magnitude_vector"),),
        is_exact=False,
    ),
    BadAdapter(
        "biases of B missing",
        "lora",
        edit_config(lora_bias=True),
        (("missing_tensor", f"{PREFIX}{Q0}.lora_B.bias"),),
        is_exact=False,
    ),
    config_case("modules_to_save", ["lm_head"], "unknown_module"),
    config_case("trainable_token_indices", [1, 2], "unknown_module"),
    config_case("target_parameters", ["mlp.experts.gate_up_proj"], "unsupported_feature"),
    config_case("layer_replication", [[0, 2]], "unsupported_feature"),
    config_case("megatron_config", {"a": 1}, "unsupported_feature"),
    config_case("use_qalora", True, "unsupported_feature"),
    config_case("task_type", "SEQ_CLS", "unsupported_feature"),
    *(
        config_case("init_lora_weights", init, "unsupported_feature")
        for init in ("pissa_niter_4", "PISSA", "corda", "loftq", "lora_ga")
    ),
    BadAdapter(
        "DoRA on what is left of the base",
        "lora",
        edit_config(init_lora_weights="pissa", use_dora=True),
        (("unsupported_feature", f"{CONFIG}:use_dora"),),
        is_exact=False,
    ),
    BadAdapter(
        "OLoRA of a turned base",
        "lora",
        edit_config(init_lora_weights="olora", fan_in_fan_out=True),
        (
            ("unsupported_feature", f"{CONFIG}:init_lora_weights"),
            ("fan_in_fan_out_mismatch", f"{CONFIG}:fan_in_fan_out"),
        ),
    ),
    config_case("auto_map", {"AutoModel": "evil.Model"}, "unknown_field"),
    config_case("auto_mapping", {"base_model_class": "os;system"}, "invalid_value"),
    config_case("new_fancy_scaling", 3, "unknown_field"),
    config_case("target_modules", "(a+)+$", "regex_target"),
    config_case("exclude_modules", ".*", "regex_target"),
    config_case("target_modules", ["q_proj", "(v|k)_proj"], "invalid_value"),
    config_case("target_modules", [], "invalid_value"),
    config_case("target_modules", ["c_attn"], "target_not_found", is_exact=False),
    config_case("target_modules", ["q_proj", "v_proj", "lm_head"], "unsupported_target"),
    config_case("target_modules", ["q_proj", "v_proj", "embed_tokens"], "unsupported_target"),
    BadAdapter(
        "rank pattern of a hostile regex",
        "lora",
        edit_config(rank_pattern={"(a|a)*b": 4}),
        (("regex_target", f"{CONFIG}:rank_pattern"),),
    ),
    BadAdapter(
        "rank pattern of rank 0",
        "lora",
        edit_config(rank_pattern={"q_proj": 0}),
        (("rank_out_of_range", f"{CONFIG}:rank_pattern:q_proj"),),
    ),
    BadAdapter(
        "alpha pattern of text",
        "lora",
        edit_config(alpha_pattern={"q_proj": "8"}),
        (("invalid_value", f"{CONFIG}:alpha_pattern:q_proj"),),
    ),
    config_case("layers_pattern", "layers", "invalid_value", name="layers_pattern alone"),
    config_case("layers_to_transform", ["0"], "invalid_value"),
    BadAdapter(
        "layers that do not exist",
        "lora",
        edit_config(layers_to_transform=[7]),
        (("target_not_found", f"{CONFIG}:target_modules"),),
        is_exact=False,
    ),
    config_case("fan_in_fan_out", True, "fan_in_fan_out_mismatch"),
    BadAdapter(
        "several faults at once",
        "lora",
        edit_config(use_qalora=True, r=-3, wings=2, target_modules=".*"),
        (
            ("unsupported_feature", f"{CONFIG}:use_qalora"),
            ("rank_out_of_range", f"{CONFIG}:r"),
            ("unknown_field", f"{CONFIG}:wings"),
            ("regex_target", f"{CONFIG}:target_modules"),
        ),
    ),
)

LORA = (
    tensor_case("missing A", "missing_tensor", {Q0_A: None}, Q0_A),
    tensor_case("missing B", "missing_tensor", {Q0_B: None}, Q0_B),
    BadAdapter(
        "a whole layer missing",
        "lora",
        edit_tensors({Q0_A: None, Q0_B: None}),
        (("missing_tensor", Q0_A), ("missing_tensor", Q0_B)),
    ),
    tensor_case("another rank than said", "shape_mismatch", {Q0_A: torch.ones(8, 16), Q0_B: torch.ones(16, 4)}, Q0_A),
    tensor_case("transposed B", "shape_mismatch", {Q0_B: lambda b: b.T}, Q0_B),
    tensor_case("A of another width", "shape_mismatch", {Q0_A: torch.ones(4, 32)}, Q0_A),
    tensor_case("one dimension", "shape_mismatch", {Q0_A: torch.ones(64)}, Q0_A),
    tensor_case("integers as weights", "unsupported_dtype", {Q0_A: torch.ones(4, 16, dtype=torch.int32)}, Q0_A),
    tensor_case("NaN in A", "non_finite", {Q0_A: set_value(float("nan"))}, Q0_A),
    tensor_case("infinity in B", "non_finite", {Q0_B: set_value(float("inf"))}, Q0_B),
    tensor_case(
        "minus infinity in half precision", "non_finite", {Q0_B: lambda b: set_value(float("-inf"))(b.half())}, Q0_B
    ),
    tensor_case("a huge value", "value_out_of_range", {Q0_A: set_value(1e30)}, Q0_A),
    tensor_case(
        "untargeted linear",
        "unexpected_tensor",
        {f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(4, 24)},
        f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight",
    ),
    tensor_case(
        "layer 2 of 2",
        "unknown_module",
        {f"{PREFIX}model.layers.2.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)},
        f"{PREFIX}model.layers.2.self_attn.q_proj.lora_A.weight",
    ),
    tensor_case(
        "adapter name left in",
        "unknown_module",
        {f"{PREFIX}{Q0}.lora_A.default.weight": torch.ones(4, 16)},
        f"{PREFIX}{Q0}.lora_A.default.weight",
    ),
    tensor_case(
        "DoRA magnitude",
        "unsupported_feature",
        {f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(16)},
        f"{PREFIX}{Q0}.lora_magnitude_vector",
    ),
    tensor_case(
        "LoRA bias", "unsupported_feature", {f"{PREFIX}{Q0}.lora_B.bias": torch.ones(16)}, f"{PREFIX}{Q0}.lora_B.bias"
    ),
    tensor_case(
        "head factors",
        "unsupported_target",
        {f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 16)},
        f"{PREFIX}lm_head.lora_A.weight",
    ),
    tensor_case(
        "whole embedding",
        "unsupported_target",
        {f"{PREFIX}model.embed_tokens.weight": torch.ones(101, 16)},
        f"{PREFIX}model.embed_tokens.weight",
    ),
    tensor_case(
        "embedding factors",
        "unsupported_feature",
        {f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 100)},
        f"{PREFIX}model.embed_tokens.lora_embedding_A",
    ),
    tensor_case(
        "trained tokens",
        "unsupported_feature",
        {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)},
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
    ),
    BadAdapter(
        "names of another architecture",
        "lora",
        edit_header(_rename_layers),
        (("missing_tensor", Q0_A), ("unknown_module", Q0_A.replace("model.layers", "transformer.h"))),
        is_exact=False,
    ),
    BadAdapter(
        "no PEFT prefix",
        "lora",
        edit_header(lambda header: {key.removeprefix(PREFIX): value for key, value in header.items()}),
        (("missing_tensor", Q0_A),),
        is_exact=False,
    ),
)
