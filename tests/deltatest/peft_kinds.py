"""One adapter of each converted PEFT type, written by PEFT itself with every trained tensor random and non-zero.

``CASES`` names them; ``make_kind`` writes one for a model of the Llama family. Several cases of one type differ in what
changes its maths (pruned ranks, patterns, decompositions).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from deltatest.peft_adapters import edit_config

TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
BASE_NAME = "tests/tiny-base"


@dataclass(frozen=True)
class KindCase:
    """``options`` go to PEFT's config class; ``change`` may edit the wrapped model before it is saved. ``std`` is the
    spread of the trained values, chosen so that the effect on the logits is clear."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    std: float = 0.1
    change: Callable[[Any], None] | None = None


def _prune(wrapped: Any) -> None:
    """What AdaLoRA's allocator leaves behind: a flag per direction, and some linears with fewer of them."""
    flags = {}
    for name, module in wrapped.base_model.model.named_modules():
        if name.endswith("q_proj"):
            flags[f"{name}.lora_E.default"] = [True, False, True, True]
        elif name.endswith("v_proj"):
            flags[f"{name}.lora_E.default"] = [False, False, True, False]
        elif name.endswith("1.mlp.up_proj"):
            flags[f"{name}.lora_E.default"] = [False] * 4
        del module
    wrapped.peft_config["default"].rank_pattern = flags


def _around_one(wrapped: Any) -> None:
    """Scales that were drawn around 0."""
    for name, parameter in wrapped.named_parameters():
        if "psoft_R.default.vector" in name:
            parameter.data += 1


def _around_base(wrapped: Any) -> None:
    """What FRoD's diagonal is before training, drawn around 0 until here."""
    for module in wrapped.modules():
        if hasattr(module, "frod_lambda_l"):
            lengths = module._calculate_frod_u_and_lambda(module.frod_V["default"], module.get_base_layer().weight)[1]
            module.frod_lambda_l["default"].data += lengths


_PSOFT = {"r": 5, "num_cayley_neumann_terms": 6, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5}
_RANDLORA = {"r": 5, "randlora_alpha": 10, "save_projection": False}
# Tests take a case's seed from its place: new ones go to the end.
CASES: dict[str, KindCase] = {
    "adalora": KindCase("AdaLoraConfig", {"init_r": 4, "lora_alpha": 16, "total_step": 10}, 0.3),
    "adalora-pruned": KindCase("AdaLoraConfig", {"init_r": 4, "lora_alpha": 8, "total_step": 10}, 0.3, _prune),
    "vera": KindCase("VeraConfig", {"r": 6, "projection_prng_key": 5}, 0.5),
    "vera-seed": KindCase("VeraConfig", {"r": 6, "projection_prng_key": 11, "save_projection": False}, 0.5),
    "loha": KindCase("LoHaConfig", {"r": 3, "alpha": 6}, 0.3),
    "loha-patterns": KindCase(
        "LoHaConfig",
        {"r": 2, "alpha": 4, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.mlp.up_proj": 8}},
        0.3,
    ),
    "lokr": KindCase("LoKrConfig", {"r": 2, "alpha": 4}, 0.3),
    "lokr-both": KindCase("LoKrConfig", {"r": 2, "alpha": 4, "decompose_both": True, "decompose_factor": 4}, 0.4),
    "lokr-whole": KindCase("LoKrConfig", {"r": 16, "alpha": 32, "rank_pattern": {"v_proj": 3}}, 0.1),
    "miss": KindCase("MissConfig", {"r": 8}, 0.05),
    "miss-ragged": KindCase("MissConfig", {"r": 7}, 0.05),
    "miss-mini": KindCase("MissConfig", {"r": 8, "mini_r": 16, "init_weights": "mini"}, 0.05),
    "gralora": KindCase("GraloraConfig", {"r": 4, "alpha": 8, "gralora_k": 2}, 0.2),
    "gralora-hybrid": KindCase("GraloraConfig", {"r": 8, "alpha": 8, "gralora_k": 4, "hybrid_r": 3}, 0.2),
    "delora": KindCase("DeloraConfig", {"r": 4, "delora_lambda": 3}, 0.5),
    "delora-patterns": KindCase("DeloraConfig", {"r": 4, "rank_pattern": {"down_proj": 7}}, 0.5),
    "vblora": KindCase("VBLoRAConfig", {"r": 3, "num_vectors": 20, "vector_length": 16, "topk": 3}, 0.5),
    "unilora": KindCase("UniLoraConfig", {"r": 3, "theta_d_length": 40, "save_indices": True}, 2.0),
    "tinylora": KindCase("TinyLoraConfig", {"r": 3, "u": 5, "weight_tying": 1.0}, 0.5),
    "hra": KindCase("HRAConfig", {"r": 3}, 1.0),
    "hra-orthogonal": KindCase("HRAConfig", {"r": 4, "apply_GS": True}, 1.0),
    "supertuning": KindCase("SupertuningConfig", {"sparsity": 0.95}, 0.3),
    "fourierft": KindCase("FourierFTConfig", {"n_frequency": 8, "random_loc_seed": 3}, 4.0),
    "fourierft-many": KindCase("FourierFTConfig", {"n_frequency": 300, "scaling": 300.0}, 0.4),
    "waveft": KindCase("WaveFTConfig", {"n_frequency": 40, "n_frequency_pattern": {"q_proj": 70}}, 0.02),
    "waveft-long": KindCase("WaveFTConfig", {"n_frequency": 12, "wavelet_family": "db2"}, 0.03),
    "waveft-full": KindCase(
        "WaveFTConfig",
        {"n_frequency": 90, "wavelet_family": "db5", "random_loc_seed": 9, "proportional_parameters": True},
        0.02,
    ),
    "waveft-entries": KindCase("WaveFTConfig", {"n_frequency": 60, "use_idwt": False}, 0.02),
    "c3a": KindCase("C3AConfig", {"block_size": 8, "block_size_pattern": {"q_proj": 16}}, 2.0),
    "randlora": KindCase("RandLoraConfig", {"r": 6, "randlora_alpha": 12}, 0.17),
    "hira": KindCase("HiraConfig", {"r": 4, "rank_pattern": {"v_proj": 2}}, 0.7),
    "vblora-cut": KindCase(
        "VBLoRAConfig",
        {"r": 3, "num_vectors": 20, "vector_length": 16, "topk": 3, "save_only_topk_weights": True},
        0.5,
    ),
    "supertuning-supra": KindCase("SupertuningConfig", {"sparsity": 0.97, "r": 3, "lora_alpha": 9.0}, 0.2),
    "miss-bat": KindCase("MissConfig", {"r": 8, "init_weights": "bat"}, 0.03),
    "deft": KindCase("DeftConfig", {"r": 3}, 0.2),
    "deft-qr": KindCase("DeftConfig", {"r": 4, "decomposition_method": "qr", "alpha": 6}, 0.12),
    "deft-para": KindCase("DeftConfig", {"r": 2, "decomposition_method": "qr", "para": True}, 0.3),
    "unilora-seed": KindCase("UniLoraConfig", {"r": 4, "theta_d_length": 50, "proj_seed": 5}, 1.5),
    "tinylora-groups": KindCase("TinyLoraConfig", {"r": 2, "u": 6, "weight_tying": 0.6}, 0.4),
    "tinylora-seed": KindCase("TinyLoraConfig", {"r": 3, "u": 4, "save_projection": False, "projection_seed": 9}, 0.4),
    "pvera": KindCase("PveraConfig", {"r": 5, "projection_prng_key": 5}, 0.5),
    "pvera-seed": KindCase("PveraConfig", {"r": 4, "projection_prng_key": 3, "save_projection": False}, 0.5),
    "psoft": KindCase("PsoftConfig", {"r": 6}, 0.2, _around_one),
    "psoft-even": KindCase("PsoftConfig", {**_PSOFT, "ab_svd_init": "pissa_init"}, 0.2, _around_one),
    "psoft-free": KindCase("PsoftConfig", {"r": 4, "psoft_orth": False, "psoft_mag_b": False}, 0.4),
    "glora": KindCase("GloraConfig", {"r": 3}, 0.3),
    "frod": KindCase("FrodConfig", {"sparse_rate": 0.02, "progressbar": False}, 0.25, _around_base),
    "randlora-seed": KindCase("RandLoraConfig", {**_RANDLORA, "projection_prng_key": 7}, 0.17),
    "randlora-sparse": KindCase("RandLoraConfig", {**_RANDLORA, "sparse": True}, 0.17),
    "randlora-thin": KindCase("RandLoraConfig", {**_RANDLORA, "very_sparse": True, "sparse": True}, 0.17),
}


def make_kind(
    model: torch.nn.Module,
    folder: Path,
    name: str,
    *,
    targets: tuple[str, ...] = TARGETS,
    seed: int = 0,
    std: float | None = None,
    **options: Any,
) -> Path:
    """Write the adapter of case ``name``; ``options`` override those of the case."""
    return write_case(model, folder, CASES[name], targets=targets, seed=seed, std=std, **options)


def write_case(
    model: torch.nn.Module,
    folder: Path,
    case: KindCase,
    *,
    targets: tuple[str, ...] = TARGETS,
    seed: int = 0,
    std: float | None = None,
    **options: Any,
) -> Path:
    """``make_kind`` of any case."""
    import peft

    config = getattr(peft, case.config)(
        target_modules=list(targets), task_type="CAUSAL_LM", **{**case.options, **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(seed)
        spread = case.std if std is None else std
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        if case.change is not None:
            case.change(wrapped)
        # "auto" would ask the hub whether the base's vocabulary was resized.
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    edit_config(folder, base_model_name_or_path=BASE_NAME)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def near_the_base(case: KindCase, model: Any) -> KindCase:
    """The case with what is the base's own (biases, modules saved whole) moved a little, and not drawn anew."""

    def change(wrapped: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        stored = dict(model.named_parameters())
        for name, parameter in wrapped.named_parameters():
            plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            plain = plain.replace("base_layer.", "")
            if parameter.requires_grad and plain in stored:
                moved = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.data = stored[plain].detach() + moved
        if case.change is not None:
            case.change(wrapped)

    return replace(case, change=change)


def merged_deltas(model: torch.nn.Module, folder: Path, modules: list[str]) -> dict[str, torch.Tensor]:
    """Oracle: what PEFT's own merge adds to the weights, in float64 ``[out, in]`` (Conv1D turned)."""
    from peft import PeftModel
    from transformers.pytorch_utils import Conv1D

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PSOFT decomposes weights of float32 or less.
        start = model if '"PSOFT"' in (folder / "adapter_config.json").read_text() else copy.deepcopy(model).double()
        merged = PeftModel.from_pretrained(copy.deepcopy(start), str(folder)).double().merge_and_unload()
    deltas = {}
    for name in modules:
        module = merged.get_submodule(name)
        delta = module.weight.detach() - model.get_submodule(name).weight.detach().double()  # type: ignore[operator]
        deltas[name] = delta.t() if isinstance(module, Conv1D) else delta
    return deltas
