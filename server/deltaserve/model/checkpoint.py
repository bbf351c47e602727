"""A checkpoint folder: find it, check its files, read it with transformers. Safetensors only; no code, no network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from deltaserve.errors import ConfigError, UnsupportedBase
from deltaserve.model.support import check_config, check_modules, check_raw_config

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
# Files a hub download may bring; weights in other formats and code stay there.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Buffers that older checkpoints carry and that models compute for themselves.
_KNOWN_LEFTOVERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|\.attention\.(masked_)?bias)$")
DUMMY_SEED = 0


def locate(path: Path | str, *, allow_hub: bool) -> Path:
    """The local folder of a base; a hub id is fetched only with ``allow_hub``. Raises ConfigError."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if not allow_hub:
        raise ConfigError(f"there is no folder {str(path)!r}; hub ids are fetched only with --allow-hub")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=_HUB_FILES))


def read_raw_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it is; refuses folders that are not a base model."""
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UnsupportedBase(f"{folder.name} holds an adapter, not a base model; upload it to a running server")
        raise UnsupportedBase(f"{folder.name} has no config.json; a Hugging Face checkpoint folder is needed")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedBase(f"config.json of {folder.name} is not valid JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise UnsupportedBase(f"config.json of {folder.name} has no model_type")
    return raw


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, sorted by name; refuses pickles and missing shards by name."""
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedBase(f"{folder.name} has an adapter_config.json beside the base; keep adapters apart")
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UnsupportedBase(f"{INDEX_FILE} of {folder.name} cannot be read: {error!r}") from error
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise UnsupportedBase(f"{INDEX_FILE} names {shard!r}; only safetensors files beside it are read")
            if not (folder / shard).is_file():
                raise UnsupportedBase(f"{folder.name} lacks {shard}, which its {INDEX_FILE} names")
        return tuple(folder / shard for shard in shards)
    others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in folder.glob(pattern))
    if others:
        raise UnsupportedBase(
            f"{folder.name} holds {others[0]} but no {SINGLE_FILE}; only safetensors weights are read, "
            "because other formats can run code"
        )
    raise UnsupportedBase(f"{folder.name} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_config(folder: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    """The checked configuration of a base."""
    check_raw_config(raw)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedBase(f"transformers cannot read the configuration of {folder.name}: {error}") from error
    check_config(config)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")
        except Exception as error:
            raise UnsupportedBase(f"transformers cannot build {config.model_type} of {folder.name}: {error}") from error
        check_modules(model)
    return config


def read_model(
    folder: Path, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, load_format: str
) -> PreTrainedModel:
    """The unmodified transformers model with eager attention, on ``device``, in evaluation mode."""
    if load_format == "dummy":
        return _make_dummy(config, dtype, device)
    transformers_logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Reported and refused below, all of them at once.
            ignore_mismatched_sizes=True,
        )
    except (SafetensorError, OSError) as error:
        raise UnsupportedBase(f"the weights of {folder.name} cannot be read: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UnsupportedBase(
            f"{folder.name} lacks {len(missing)} tensors of the architecture, the first: {missing[0]}"
        )
    extra = sorted(key for key in info["unexpected_keys"] if not _KNOWN_LEFTOVERS.search(key))
    if extra:
        raise UnsupportedBase(f"{folder.name} has {len(extra)} tensors the architecture lacks, the first: {extra[0]}")
    if info["mismatched_keys"]:
        key, found, needed = sorted(info["mismatched_keys"])[0]
        raise UnsupportedBase(f"{key} of {folder.name} is {list(found)}; the architecture needs {list(needed)}")
    return model.to(device).eval().requires_grad_(False)


def _make_dummy(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Deterministic random weights: one random tile, repeated, since only speed is measured with them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(DUMMY_SEED)
        tile = torch.empty(1_048_573, dtype=dtype).normal_(std=0.02)
        # The architecture's own initialisation of large matrices is slow, so it is skipped.
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False, attn_implementation="eager"
            )
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            if parameter.ndim < 2:
                continue
            flat = parameter.data.view(-1)
            # Another start in the tile for each matrix, so that no two are equal.
            shifted = tile.roll(index * 7919)
            for start in range(0, flat.numel(), tile.numel()):
                piece = flat[start : start + tile.numel()]
                piece.copy_(shifted[: piece.numel()])
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
    model.tie_weights()
    return model.eval().requires_grad_(False)


def max_context(config: PreTrainedConfig) -> int:
    """The longest sequence, in tokens. Raises ``UnsupportedBase``."""
    limit: Any = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise UnsupportedBase(f"{config.model_type} states no max_position_embeddings; its context length is unknown")
    return limit


def eos_token_ids(model: PreTrainedModel, config: PreTrainedConfig) -> tuple[int, ...]:
    """Tokens that end an answer, by ``generation_config.json``, else by the configuration."""
    generation = getattr(model, "generation_config", None)
    for source in (generation, config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()
