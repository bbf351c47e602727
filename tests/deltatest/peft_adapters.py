"""Makers of random, real adapter folders for a Hugging Face model, and PEFT's own answer as the oracle.

Folders are written by PEFT itself (LoRA, SHiRA), so that what the server reads is what users bring. Every tensor is
random and non-zero: PEFT's default starts B at zero, which would make any test of an adapter's effect pass by chance.
``model`` is never changed: PEFT injects into a deep copy.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from deltaserve_store.spec import BaseSpec

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_peft_lora(
    model: torch.nn.Module,
    folder: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = DEFAULT_TARGETS,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    layers: Sequence[int] | None = None,
    fan_in_fan_out: bool = False,
    seed: int = 0,
    std: float = 0.05,
    dtype: torch.dtype = torch.float32,
    base_name: str = "tests/tiny-base",
    **config: Any,
) -> Path:
    """Write a PEFT LoRA folder with normal(0, ``std``) A and B in ``dtype``; further ``config`` goes to LoraConfig."""
    from peft import LoraConfig

    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(targets),
        use_rslora=use_rslora,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        layers_to_transform=list(layers) if layers is not None else None,
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
        **config,
    )
    return _write_peft(model, lora, folder, seed, std, dtype, base_name)


def make_peft_shira(
    model: torch.nn.Module,
    folder: Path,
    *,
    rank: int = 2,
    targets: Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
    std: float = 0.05,
    dtype: torch.dtype = torch.float32,
    base_name: str = "tests/tiny-base",
) -> Path:
    """Write a PEFT SHiRA folder: ``rank * (in + out)`` random positions a linear, values normal(0, ``std``)."""
    from peft import ShiraConfig

    shira = ShiraConfig(r=rank, target_modules=list(targets), random_seed=seed, task_type="CAUSAL_LM")
    return _write_peft(model, shira, folder, seed, std, dtype, base_name)


def make_peft_ia3(
    model: torch.nn.Module,
    folder: Path,
    *,
    targets: Sequence[str] = ("k_proj", "v_proj", "down_proj"),
    feedforward: Sequence[str] = ("down_proj",),
    seed: int = 0,
    std: float = 0.05,
    dtype: torch.dtype = torch.float32,
    base_name: str = "tests/tiny-base",
) -> Path:
    """Write a PEFT IA3 folder with scales around 1, their deviation 4 times ``std``."""
    from peft import IA3Config

    ia3 = IA3Config(target_modules=list(targets), feedforward_modules=list(feedforward), task_type="CAUSAL_LM")
    return _write_peft(model, ia3, folder, seed, std, dtype, base_name)


def make_peft_ln_tuning(
    model: torch.nn.Module,
    folder: Path,
    *,
    targets: Sequence[str] = ("input_layernorm", "post_attention_layernorm", "norm"),
    seed: int = 0,
    std: float = 0.05,
    dtype: torch.dtype = torch.float32,
    base_name: str = "tests/tiny-base",
) -> Path:
    """Write a PEFT LN tuning folder with gains and shifts around the base's."""
    from peft import LNTuningConfig

    tuning = LNTuningConfig(target_modules=list(targets), task_type="CAUSAL_LM")
    return _write_peft(model, tuning, folder, seed, std, dtype, base_name)


def make_sparse(
    spec: BaseSpec,
    folder: Path,
    *,
    num_entries: int = 40,
    targets: Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
    std: float = 0.2,
    dtype: torch.dtype = torch.float32,
    fingerprint: str | None = None,
    **config: Any,
) -> Path:
    """Write a folder in the project's own sparse format: ``num_entries`` random positions of each linear that ends
    with one of ``targets``, values normal(0, ``std``)."""
    from deltaserve_store.formats.deltaserve_sparse import write_sparse_adapter
    from deltaserve_store.parsed import SparseDelta

    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for name, linear in spec.linears.items():
        if name.rsplit(".", 1)[-1] not in targets:
            continue
        flat = torch.randperm(linear.out_features * linear.in_features, generator=generator)[:num_entries]
        rows, cols = (flat // linear.in_features).int(), (flat % linear.in_features).int()
        values = (torch.randn(len(flat), generator=generator) * std).to(dtype)
        deltas.append(SparseDelta(name, rows, cols, values))
    write_sparse_adapter(folder, deltas, fingerprint or spec.fingerprint, **config)
    return folder


def make_bitfit(
    spec: BaseSpec,
    folder: Path,
    *,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    std: float = 0.1,
    fingerprint: str | None = None,
    **config: Any,
) -> Path:
    """Write biases of linears (all, or those that end with one of ``targets``) and, where there are any, of norms, in
    the project's own format; values normal(0, ``std``)."""
    from deltaserve_store.formats.deltaserve_vectors import write_vector_adapter
    from deltaserve_store.vector_deltas import NormDelta, VectorDelta

    generator = torch.Generator().manual_seed(seed)
    deltas: list[VectorDelta | NormDelta] = [
        VectorDelta(name, bias=torch.randn(linear.out_features, generator=generator) * std)
        for name, linear in spec.linears.items()
        if targets is None or name.rsplit(".", 1)[-1] in targets
    ]
    for name, norm in spec.norms.items():
        if norm.has_bias:
            deltas.append(NormDelta(name, shift=torch.randn(norm.size, generator=generator) * std))
    write_vector_adapter(folder, deltas, fingerprint or spec.fingerprint, method="bitfit", **config)
    return folder


def make_gates(spec: BaseSpec, folder: Path, *, seed: int = 0, std: float = 0.2) -> Path:
    """Write scales in the project's own format: of the inputs of every second linear, of the outputs of the others,
    and differences of all gains."""
    from deltaserve_store.formats.deltaserve_vectors import write_vector_adapter
    from deltaserve_store.vector_deltas import NormDelta, VectorDelta

    generator = torch.Generator().manual_seed(seed)
    deltas: list[VectorDelta | NormDelta] = []
    for index, (name, linear) in enumerate(spec.linears.items()):
        if index % 2:
            deltas.append(VectorDelta(name, in_scale=1 + std * torch.randn(linear.in_features, generator=generator)))
        else:
            deltas.append(VectorDelta(name, out_scale=1 + std * torch.randn(linear.out_features, generator=generator)))
    for name, norm in spec.norms.items():
        deltas.append(NormDelta(name, gain=std * torch.randn(norm.size, generator=generator)))
    write_vector_adapter(folder, deltas, spec.fingerprint, method="gates")
    return folder


def _write_peft(
    model: torch.nn.Module, config: Any, folder: Path, seed: int, std: float, dtype: torch.dtype, base_name: str
) -> Path:
    from peft import get_peft_model

    trains_bias = getattr(config, "bias", "none") != "none"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "ia3_" in name or "magnitude" in name or "ln_tuning_" in name or (trains_bias and "bias" in name):
                    # Around what it is now: a scale, a norm of rows, a gain or a bias.
                    size = parameter.abs().mean().clamp(min=0.5)
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 4 * std * size)
                elif "lora_" in name or "shira_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        # "auto" would ask the hub whether the base's vocabulary was resized.
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    edit_config(folder, base_model_name_or_path=base_name)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of ``adapter_config.json``; the value ``...`` removes a field."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config, indent=2))
    return folder


def edit_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> Path:
    """Add or replace tensors of ``adapter_model.safetensors`` by name; None removes one."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            tensors.pop(name)
        else:
            tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def peft_logits(model: torch.nn.Module, folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """Oracle: float32 logits ``[T, vocab]`` of ``model`` with the folder loaded by PEFT (unmerged)."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    with torch.no_grad():
        return wrapped(torch.tensor([list(ids)])).logits[0].float()


def base_logits(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """Oracle: float32 logits ``[T, vocab]`` of the plain model."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float()


def peft_greedy(model: torch.nn.Module, folder: Path | None, ids: Sequence[int], max_tokens: int) -> list[int]:
    """Oracle: greedy completion ids through ``generate`` (end-of-sequence ignored), with or without an adapter."""
    from peft import PeftModel

    subject: Any = copy.deepcopy(model)
    subject.generation_config.eos_token_id = None
    if folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject = PeftModel.from_pretrained(subject, str(folder))
    subject.eval()
    prompt = torch.tensor([list(ids)])
    with torch.no_grad():
        output = subject.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
        )
    return output[0, len(ids) :].tolist()
