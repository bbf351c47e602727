"""Which bases can be served, decided before any weight is read: first from the configuration, then from the modules.

Everything refused is named, with what is served instead. What these checks cannot see (an unusual mask, a second kind
of attention) the trace and the comparison at load refuse later.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from deltaserve.errors import UnsupportedBase

SERVED = "served: dense decoder-only architectures of transformers"
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})

_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
_MODALITY_FIELDS = ("vision_config", "audio_config", "speech_config", "image_token_id", "image_token_index")
_EXPERT_CLASS = re.compile(r"Experts?$|Moe|MoE|MOE|Router$")


def check_raw_config(raw: dict[str, Any]) -> None:
    """Refuse what ``config.json`` itself gives away; ``raw`` is the parsed file."""
    if raw.get("auto_map"):
        raise UnsupportedBase("config.json has auto_map: the base brings its own code, which is never run; " + SERVED)
    if raw.get("quantization_config") or raw.get("compression_config"):
        method = (raw.get("quantization_config") or {}).get("quant_method", "unknown")
        raise UnsupportedBase(
            f"quantized checkpoint ({method}) is not served; use float32, bfloat16 or float16 weights"
        )
    if raw.get("is_encoder_decoder"):
        raise UnsupportedBase(f"{raw.get('model_type')} is an encoder-decoder; " + SERVED)
    for name in _MODALITY_FIELDS:
        if raw.get(name) is not None:
            raise UnsupportedBase(f"{raw.get('model_type')} is multimodal (config has {name}); " + SERVED)


def check_config(config: PreTrainedConfig) -> None:
    """Refuse what the resolved configuration gives away (defaults of the architecture included)."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedBase(f"{name} is an encoder-decoder; {SERVED}")
    if config.get_text_config() is not config:
        raise UnsupportedBase(f"{name} is multimodal (its text model is a part of it); {SERVED}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedBase(f"{name} has no causal language model in transformers; {SERVED}")
    for field in _EXPERT_FIELDS:
        count = getattr(config, field, None)
        if isinstance(count, int) and count > 0:
            raise UnsupportedBase(f"{name} is a mixture of experts ({field}={count}); MoE bases are not served")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if getattr(model_class, "_is_stateful", False):
        raise UnsupportedBase(
            f"{model_class.__name__} keeps a recurrent state (state-space or linear attention); {SERVED}"
        )
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if odd:
        raise UnsupportedBase(
            f"{name} has layers of type {', '.join(map(repr, odd))}, whose cache kind is not served; "
            f"served: {', '.join(sorted(LAYER_TYPES))}"
        )


def check_modules(model: PreTrainedModel) -> None:
    """Refuse by structure; ``model`` may be on the meta device."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if _EXPERT_CLASS.search(kind):
            raise UnsupportedBase(f"{path} ({kind}) is a mixture of experts; MoE bases are not served")
        if isinstance(module, (nn.RNNBase, nn.modules.conv._ConvNd)):
            raise UnsupportedBase(f"{path} ({kind}) mixes positions outside attention; {SERVED}")
        for field, parameter in module.named_parameters(recurse=False):
            is_linear = type(module) in (nn.Linear, Conv1D) or isinstance(module, nn.Embedding)
            if parameter.ndim > 1 and not is_linear:
                shape = list(parameter.shape)
                raise UnsupportedBase(f"{path}.{field} {shape} belongs to a {kind}, not to a plain linear or embedding")


def find_layers(model: nn.Module, decoder: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList]:
    """The path inside ``model`` of the decoder's list of layers, and the list."""
    prefix = next(path for path, module in model.named_modules() if module is decoder)
    for path, module in decoder.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return path, module
    raise UnsupportedBase(f"{type(decoder).__name__} has no list of {num_layers} layers; {SERVED}")
